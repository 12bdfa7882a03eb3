//! Certificates for connections whose TLS ends here: an authority of each network's own, in memory, limited to the hosts
//! that it is for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::http::Protocol;

/// How long before and after its making a certificate is valid: a guest's clock may be off.
const VALID_BEFORE: Duration = Duration::from_secs(2 * 24 * 3600);
const VALID_AFTER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The names that certificates are kept for.
const KEPT: usize = 256;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error("the certificate cannot be made")]
    Make(#[from] rcgen::Error),
    #[error("the certificate cannot be used")]
    Use(#[from] rustls::Error),
}

/// Signs certificates that a guest trusts. Its key is never written anywhere.
pub(crate) struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    kept: Mutex<HashMap<(String, Protocol), Arc<ServerConfig>>>,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAuthority").finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// Makes one whose certificates are good for these domains and what is below them.
    pub(crate) fn new(domains: impl IntoIterator<Item = String>) -> Result<Self, CertificateError> {
        let mut params = params(Vec::new(), "pyro authority of one sandbox")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: domains.into_iter().map(GeneralSubtree::DnsName).collect(),
            excluded_subtrees: Vec::new(),
        });
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem, kept: Mutex::default() })
    }

    /// Its own certificate, for guests to trust.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// How a server of this name speaks TLS.
    pub(crate) fn server(
        &self,
        name: &str,
        protocol: Protocol,
    ) -> Result<Arc<ServerConfig>, CertificateError> {
        let kept_as = (name.to_owned(), protocol);
        if let Some(config) = self.kept().get(&kept_as) {
            return Ok(Arc::clone(config));
        }
        let mut params = params(vec![name.to_owned()], name)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)?;
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        let config = Arc::new(config);
        let mut kept = self.kept();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(kept_as, Arc::clone(&config));
        Ok(config)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<(String, Protocol), Arc<ServerConfig>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cryptography of all TLS here.
pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn params(names: Vec<String>, common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    // The longest that this field may be.
    params.distinguished_name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(VALID_BEFORE);
    params.not_after = epoch + (now + VALID_AFTER);
    Ok(params)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};

    use super::*;

    /// Whether a client that trusts the authority accepts this name.
    fn is_accepted(authority: &CertificateAuthority, name: &str) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("PEM")).expect("a root");
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = authority.server(name, Protocol::Http1).expect("a certificate");
        let mut server = ServerConnection::new(server).expect("a server");
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
        while client.is_handshaking() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).expect("written");
            }
            server.read_tls(&mut bytes.as_slice()).expect("read");
            server.process_new_packets().expect("a hello");
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).expect("written");
            }
            client.read_tls(&mut bytes.as_slice()).expect("read");
            if client.process_new_packets().is_err() {
                return false;
            }
        }
        true
    }

    #[test]
    fn certificates_are_good_for_the_hosts_of_the_authority_only() {
        let authority =
            CertificateAuthority::new(["a.test".to_owned(), "b.test".to_owned()]).expect("an authority");
        assert!(is_accepted(&authority, "a.test") && is_accepted(&authority, "x.b.test"));
        assert!(!is_accepted(&authority, "c.test") && !is_accepted(&authority, "xa.test"));
    }

    #[test]
    fn names_without_end_are_not_kept() {
        let authority = CertificateAuthority::new(["a.test".to_owned()]).expect("an authority");
        for at in 0..=KEPT {
            authority.server(&format!("{at}.a.test"), Protocol::Http2).expect("a certificate");
        }
        assert_eq!(authority.kept().len(), 1);
    }
}
