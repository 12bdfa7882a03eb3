//! A guest's network, as machines get it: a namespace for each start, and its owner in this process.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use pyro_net::log::Counts;
use pyro_net::log::Denial;
use pyro_net::policy::{Change, HostPattern, Mode, Opening, PolicyText, Rule, load};
use pyro_net::secret::{MAX_SECRETS, Secret, SecretSource};
use pyro_net::{Attach, Namespace, NamespaceError, Network, Settings};
use pyro_vmm::{Driver, Nic, Tap, TapBy, Vmm};
use serde::{Deserialize, Serialize};

use crate::environment::absolute_path;
use crate::error::{Error, ErrorKind, chain};
use crate::task::TaskFile;

pub use pyro_net::Outbound;
pub use pyro_net::log::Entry as NetworkLogEntry;
pub use pyro_net::policy::Policy;
pub use pyro_net::secret::{HeldSecret, SecretText};

/// Where taps come from.
const TUN: &str = "/dev/net/tun";
/// The files of a machine's network in its directory: the table of names, and the log.
pub(crate) const NAMES: &str = "names";
pub(crate) const LOG: &str = "network.jsonl";
/// What all secrets of a machine may be together, in bytes.
const MAX_SECRET_BYTES: usize = 64 << 10;
/// The port at which secrets are sent: TLS alone.
const HTTPS: u16 = 443;
/// Denials that a command's result tells.
const MOST_NOTES: usize = 5;
/// Rules that such a note names.
const MOST_RULES: usize = 10;

/// A namespace with a network device for one machine. Dropping it ends it, once no machine uses it.
#[derive(Debug)]
pub(crate) struct GuestLink {
    /// The device.
    pub(crate) nic: Nic,
    tcp: TcpListener,
    dns: UdpSocket,
}

impl GuestLink {
    /// Makes one as this VMM takes it.
    pub(crate) async fn make(vmm: &Driver) -> Result<Self, Error> {
        let tap_by = vmm.capabilities().tap_by;
        let made = tokio::task::spawn_blocking(move || make(tap_by)).await;
        made.map_err(|error| Error::host("a thread", &error))?.map_err(|error| unavailable(&error))
    }

    /// Serves what the guest sends, as these settings say.
    pub(crate) fn serve(self, settings: Settings) -> Result<Network, Error> {
        Network::start(self.tcp, self.dns, settings)
            .map_err(|error| Error::host("the guest's network", &error))
    }
}

fn make(tap_by: TapBy) -> Result<GuestLink, NamespaceError> {
    let attach = match tap_by {
        TapBy::Descriptor => Attach::Descriptor,
        TapBy::Name => Attach::Name,
    };
    let Namespace { tap, net, user, tcp, dns } = Namespace::make(attach, Path::new(TUN))?;
    let tap = match tap {
        Some(tap) => Tap::Descriptor(Arc::new(tap)),
        None => Tap::Name { name: pyro_net::TAP, net: Arc::new(net), user: user.map(Arc::new) },
    };
    Ok(GuestLink { nic: Nic { mac: pyro_net::GUEST_MAC, tap }, tcp, dns })
}

/// Makes a namespace and ends it, to find out whether guests can have a network here.
pub(crate) fn probe(vmm: &Driver) -> Result<(), Error> {
    make(vmm.capabilities().tap_by).map(drop).map_err(|error| unavailable(&error))
}

fn unavailable(error: &NamespaceError) -> Error {
    Error::new(ErrorKind::NetworkUnavailable, format!("network is unavailable: {}", chain(error)))
        .hint(error.remedy())
}

/// The network policy of a machine, as records show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkPolicy {
    /// `none`, `deny`, `allow` or `open`.
    pub mode: String,
    /// What is allowed.
    pub allow: Vec<String>,
    /// What is denied.
    pub deny: Vec<String>,
    /// Names with addresses of their own, from a policy file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<String, String>,
    /// Hosts whose requests are read, with those that are allowed, from a policy file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inspect: BTreeMap<String, Vec<String>>,
    /// Equal for equal policies.
    pub digest: String,
}

/// That of a record which an older pyro wrote: its guests had no network.
impl Default for NetworkPolicy {
    fn default() -> Self {
        Self::from(&Policy::none())
    }
}

impl From<&Policy> for NetworkPolicy {
    fn from(policy: &Policy) -> Self {
        let texts = |rules: &[Rule]| rules.iter().map(Rule::to_string).collect();
        Self {
            mode: policy.mode().as_str().to_owned(),
            allow: texts(policy.allow()),
            deny: texts(policy.deny()),
            hosts: policy.hosts().iter().map(|(name, to)| (name.clone(), to.to_string())).collect(),
            inspect: policy
                .inspect()
                .iter()
                .map(|(host, rules)| (host.to_string(), rules.iter().map(ToString::to_string).collect()))
                .collect(),
            digest: policy.digest(),
        }
    }
}

/// The network of a machine, or the reason why it has none.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 3")]
pub struct NetworkInfo {
    pub vm_id: String,
    pub network_enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway_ip: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet_cidr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac_address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns_servers: Option<Vec<String>>,
    pub outbound_connectivity_expected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl NetworkInfo {
    /// That of a machine under this policy.
    pub(crate) fn of(vm_id: String, policy: &NetworkPolicy) -> Self {
        let is_enabled = policy.mode != "none";
        let told = |text: String| is_enabled.then_some(text);
        Self {
            vm_id,
            network_enabled: is_enabled,
            tap_name: tap_name(is_enabled),
            guest_ip: guest_ip(is_enabled),
            gateway_ip: told(pyro_net::GATEWAY.to_string()),
            subnet_cidr: told(format!("{}/{}", pyro_net::SUBNET, pyro_net::PREFIX)),
            mac_address: told(pyro_net::GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")),
            dns_servers: is_enabled.then(|| vec![pyro_net::GATEWAY.to_string()]),
            outbound_connectivity_expected: matches!(policy.mode.as_str(), "allow" | "open"),
            reason: (!is_enabled).then(|| "network is disabled for this VM".to_owned()),
        }
    }
}

/// The address of a guest, as records show it.
pub(crate) fn guest_ip(is_enabled: bool) -> Option<String> {
    is_enabled.then(|| pyro_net::GUEST.to_string())
}

/// The tap of a guest in its namespace, as records show it.
pub(crate) fn tap_name(is_enabled: bool) -> Option<String> {
    is_enabled.then(|| pyro_net::TAP.to_owned())
}

/// What to tell the caller of a command about what was denied while it ran, so that it does not try again.
pub(crate) fn notes(network: Option<&Network>, mark: u64) -> Vec<String> {
    let Some(network) = network else { return Vec::new() };
    let denials = network.denials_since(mark);
    if denials.is_empty() {
        return Vec::new();
    }
    let policy = network.policy();
    let mut allowed: Vec<String> = policy.allow().iter().take(MOST_RULES).map(Rule::to_string).collect();
    if policy.allow().len() > MOST_RULES {
        allowed.push("...".to_owned());
    }
    if policy.mode() == Mode::Open {
        allowed.insert(0, "the public internet".to_owned());
    }
    let allowed = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
    // That no rule is for it goes without saying.
    let why = |denial: &Denial| match denial.why.as_deref() {
        None | Some("no rule allows it" | "policy is closed" | "the policy does not allow it") => {
            String::new()
        }
        Some(why) => format!(" ({why})"),
    };
    let mut notes: Vec<String> = denials
        .iter()
        .take(MOST_NOTES)
        .map(|denial| format!("{denial} denied by policy{}; allowed: {allowed}", why(denial)))
        .collect();
    if denials.len() > MOST_NOTES {
        notes.push(format!("{} more denied by policy", denials.len() - MOST_NOTES));
    }
    notes
}

/// The network that a caller asks for, in words. With none of them a guest has no network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkRequest {
    /// Allow the public internet.
    pub network: bool,
    /// Rules that allow.
    pub allow: Vec<String>,
    /// Rules that deny.
    pub deny: Vec<String>,
    /// A policy file, or what one would hold.
    pub network_policy: Option<PolicySource>,
    /// What the guest uses and does not see, by the variable that it has of it.
    pub secrets: BTreeMap<String, SecretText>,
}

/// Where further rules come from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "network_policy must be a name, a path, or an object")]
pub enum PolicySource {
    /// A path with a slash, or the name of a file in the user's own folder of policies.
    File(String),
    /// What a file would hold.
    Object(PolicyText),
}

impl NetworkRequest {
    /// The policy that these words mean. `policies` is the user's own folder of policies.
    ///
    /// # Errors
    /// When a rule or a file cannot be understood.
    pub fn policy(&self, policies: Option<&Path>) -> Result<Policy, Error> {
        if *self == (Self { secrets: self.secrets.clone(), ..Self::default() }) {
            return Ok(Policy::none());
        }
        let here = std::env::current_dir().unwrap_or_default();
        let mut parts = match &self.network_policy {
            None => pyro_net::policy::PolicyParts::default(),
            Some(PolicySource::File(file)) => {
                load(file, &here, policies).map_err(|error| invalid(&chain(&error)))?
            }
            Some(PolicySource::Object(text)) => {
                text.clone().resolve(&here, policies).map_err(|error| invalid(&chain(&error)))?
            }
        };
        parts.allow.extend(rules(&self.allow)?);
        parts.deny.extend(rules(&self.deny)?);
        Policy::new(parts.open || self.network, parts.allow, parts.deny)
            .and_then(|policy| policy.with_hosts(parts.hosts)?.with_inspect(parts.inspect))
            .map_err(|error| invalid(&error.to_string()))
    }

    /// Reads the values of the secrets.
    ///
    /// # Errors
    /// When one is not as it should be, or has no value.
    pub fn hold_secrets(&self) -> Result<Vec<HeldSecret>, Error> {
        let hold = |(name, text): (&String, &SecretText)| {
            let mut secret = Secret::of(name, text).map_err(|error| invalid(&error.to_string()))?;
            if let SecretSource::File(path) = &mut secret.value_from {
                *path = absolute_path(path)?;
            }
            let mut random = [0; 16];
            getrandom::fill(&mut random).map_err(|error| Error::host("random numbers", &error))?;
            secret.placeholder = Secret::new_placeholder(random);
            secret.hold(name).map_err(|error| {
                invalid(&error.to_string()).hint("set the variable or write the file, and try again")
            })
        };
        self.secrets.iter().map(hold).collect()
    }
}

/// A secret as records show it: never its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SecretRecord {
    /// Where its value comes from.
    pub value_from: String,
    /// The hosts that it is sent to.
    pub hosts: Vec<String>,
}

impl From<&Secret> for SecretRecord {
    fn from(secret: &Secret) -> Self {
        Self {
            value_from: secret.value_from.to_string(),
            hosts: secret.hosts.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Checks that secrets can be used under a policy: one for a host that cannot be reached is a mistake.
pub(crate) fn check_secrets(secrets: &[HeldSecret], policy: &Policy) -> Result<(), Error> {
    if secrets.len() > MAX_SECRETS {
        return Err(invalid(&format!("a machine has at most {MAX_SECRETS} secrets, not {}", secrets.len())));
    }
    if secrets.iter().map(HeldSecret::len).sum::<usize>() > MAX_SECRET_BYTES {
        return Err(invalid(&format!("the values of all secrets are longer than {MAX_SECRET_BYTES} bytes")));
    }
    for held in secrets {
        let unreached = held.secret.hosts.iter().filter_map(HostPattern::single);
        let unreached = unreached.filter(|host| !policy.by_name(host, HTTPS).allowed).min();
        if let Some(host) = unreached {
            let text =
                format!("secret '{}' is for {host}, which the network policy does not allow", held.name);
            return Err(invalid(&text).hint(format!("allow it: --allow {host}:{HTTPS}")));
        }
        if !policy.has_nic() {
            return Err(invalid(&format!("secret '{}' needs a network", held.name))
                .hint("allow a host: --allow HOST"));
        }
    }
    Ok(())
}

/// Reads the values of a task's secrets anew.
pub(crate) fn secrets_of(file: &TaskFile) -> Result<Vec<HeldSecret>, Error> {
    let hold = |(name, secret): (&String, &Secret)| {
        secret.clone().hold(name).map_err(|error| {
            invalid(&error.to_string())
                .hint("values are kept nowhere: whoever starts the task again must have them")
        })
    };
    file.secrets.iter().map(hold).collect()
}

fn rules(texts: &[String]) -> Result<Vec<Rule>, Error> {
    let parsed = texts.iter().map(|text| text.parse::<Rule>());
    parsed.collect::<Result<_, _>>().map_err(|error| invalid(&error.to_string()))
}

fn invalid(text: &str) -> Error {
    Error::new(ErrorKind::InvalidValue, text)
}

/// A change to the network policy of a task that runs, in words. Rules are revoked before others are added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkChange {
    /// Rules to add to those that allow.
    pub allow: Vec<String>,
    /// Rules to add to those that deny.
    pub deny: Vec<String>,
    /// Rules to remove.
    pub revoke: Vec<String>,
    /// Allow the public internet, or allow it no more; none: as it is.
    pub open: Option<bool>,
}

impl NetworkChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn parsed(&self) -> Result<Change, Error> {
        Ok(Change {
            allow: rules(&self.allow)?,
            deny: rules(&self.deny)?,
            revoke: rules(&self.revoke)?,
            mode: self.open.map(|open| if open { Opening::Open } else { Opening::Closed }),
        })
    }

    /// The policy after this change.
    pub(crate) fn applied(&self, policy: &Policy) -> Result<Policy, Error> {
        policy.change(&self.parsed()?).map_err(|error| {
            let kind = match error {
                pyro_net::policy::ChangeError::NoNetwork => ErrorKind::WrongState,
                _ => ErrorKind::InvalidValue,
            };
            Error::new(kind, error.to_string())
        })
    }
}

/// The network of a task: its policy, and what its guest did.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskNetwork {
    /// The task.
    pub task_id: String,
    /// The policy.
    pub network_policy: NetworkPolicy,
    /// The digest of the policy before the change that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old_digest: Option<String>,
    /// The digest of the policy after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_digest: Option<String>,
    /// Connections that the change has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed_connections: Option<usize>,
    /// Counts since the guest was started; none: it does not run.
    pub counts: Option<NetworkCounts>,
}

/// What a guest did on its network since it was started.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkCounts {
    /// Connections and queries that were allowed.
    pub allowed: u64,
    /// Those that were denied.
    pub denied: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Entries that the log has no room for.
    pub log_dropped: u64,
}

impl From<Counts> for NetworkCounts {
    fn from(counts: Counts) -> Self {
        let Counts { allowed, denied, dropped, bytes_in, bytes_out } = counts;
        Self { allowed, denied, bytes_in, bytes_out, log_dropped: dropped }
    }
}

/// A part of what a task's guest did on its network.
#[derive(Clone, Debug, Serialize)]
pub struct NetworkLog {
    /// The task.
    pub task_id: String,
    /// How many entries follow.
    pub count: usize,
    /// In the order in which they were written.
    pub entries: Vec<NetworkLogEntry>,
    /// From where to read on.
    pub next_offset: u64,
}
