//! A certificate of the host's that programs in the guest trust, beside those that the image has.

use std::io::{self, Read};

use pyro_proto::EnvVar;
use rustix::fs::OFlags;

use crate::identity::{open_in_root, write_in_root};

/// Where distributions have the certificates of authorities in one file.
const BUNDLES: [&str; 4] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
];
/// The certificate alone, for programs that add one to what they trust.
const ALONE: &str = "etc/pyro-authority.pem";
/// What programs find a bundle by, and the certificate alone.
const BUNDLE_VARIABLES: [&str; 7] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
];
const ALONE_VARIABLES: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];
/// What stands around the certificate in a bundle, by which that of an earlier start is found.
const BEGIN: &str = "# pyro: the authority of this sandbox\n";
const END: &str = "# pyro: end\n";
/// The longest bundle that is changed, in bytes.
const MOST_BYTES: u64 = 4 << 20;

/// Puts the certificate into each bundle of the guest; returns the variables by which programs find it. None: no variables.
///
/// A guest may have put anything in the place of these files: what cannot be changed stays as it is.
pub(crate) fn variables(authority: &[u8]) -> Vec<EnvVar> {
    let Ok(authority) = str::from_utf8(authority) else { return Vec::new() };
    if authority.is_empty() {
        return Vec::new();
    }
    let mut bundle = None;
    for path in BUNDLES {
        match add(path, authority) {
            Ok(()) => _ = bundle.get_or_insert(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => crate::say(&format!("phase=identity: {path}: {error}")),
        }
    }
    let variable = |path: &'static str| {
        move |name: &&str| EnvVar {
            name: name.as_bytes().to_vec().into(),
            value: format!("/{path}").into_bytes().into(),
        }
    };
    let mut variables = Vec::new();
    match write_in_root(ALONE, authority) {
        Ok(()) => variables.extend(ALONE_VARIABLES.iter().map(variable(ALONE))),
        Err(error) => crate::say(&format!("phase=identity: {ALONE}: {error}")),
    }
    // Without a bundle, a program that has certificates of its own would lose them.
    if let Some(bundle) = bundle {
        variables.extend(BUNDLE_VARIABLES.iter().map(variable(bundle)));
    }
    variables
}

/// Appends the certificate to a bundle, in the place of one from an earlier start.
fn add(path: &str, authority: &str) -> io::Result<()> {
    let file = open_in_root(path, OFlags::RDONLY)?;
    if file.metadata()?.len() > MOST_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text)?;
    write_in_root(path, &with(text, authority))
}

fn with(mut text: String, authority: &str) -> String {
    if let Some(begin) = text.find(BEGIN) {
        let end = text[begin..].find(END).map_or(text.len(), |end| begin + end + END.len());
        text.replace_range(begin..end, "");
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text + BEGIN + authority.trim_end() + "\n" + END
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_of_a_later_start_takes_the_place_of_the_earlier_one() {
        let first = with("A\nB".to_owned(), "ONE\n");
        assert_eq!(first, format!("A\nB\n{BEGIN}ONE\n{END}"));
        let grown = format!("{first}C\n");
        assert_eq!(with(grown, "TWO"), format!("A\nB\nC\n{BEGIN}TWO\n{END}"));
        // One that was cut off does not stay.
        assert_eq!(with(format!("A\n{BEGIN}ON"), "TWO"), format!("A\n{BEGIN}TWO\n{END}"));
    }
}
