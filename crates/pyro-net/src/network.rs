//! The owner's part of a guest's network: accepts, decides, dials, and writes down.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener as StdTcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use crate::certificates::CertificateAuthority;
use crate::connect::{self, Opened};
use crate::dial::Dialer;
use crate::log::{Counts, Denial, Entry, Kind, Log};
use crate::names::Names;
use crate::outbound::Outbound;
use crate::policy::{HostPattern, Policy};
use crate::relay::reset;
use crate::resolver::Queries;
use crate::secret::HeldSecret;

/// Connections that a guest may have at the same time: each costs descriptors and the kernel's buffers.
const CONNECTIONS: usize = 1024;
/// Descriptors that a connection takes at the most.
const DESCRIPTORS_EACH: usize = 4;
/// Descriptors that are left to the rest of the process, which must work whatever a guest does.
const DESCRIPTORS_KEPT: usize = 256;
/// Queries that are answered at the same time.
const QUERIES: usize = 64;
/// New names within [`NAMES_PERIOD`]: a name that is looked up can carry data to its own name servers.
const NEW_NAMES: u32 = 600;
const NAMES_PERIOD: Duration = Duration::from_secs(60);
/// The pause after an accept that failed for want of descriptors.
const NO_DESCRIPTORS: Duration = Duration::from_millis(50);
/// How often counted entries of the log are written.
const LOG_PERIOD: Duration = Duration::from_secs(1);
/// The longest log, in bytes.
const LOG_BYTES: u64 = 16 << 20;

/// What a guest's network is made from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the guest may reach.
    pub policy: Policy,
    /// The file of the alias table; none: it is kept in memory.
    pub names: Option<PathBuf>,
    /// The file of the log; none: only counts are kept.
    pub log: Option<PathBuf>,
    /// What the guest may use and not see.
    pub secrets: Vec<HeldSecret>,
    /// How this host reaches the internet.
    pub outbound: Outbound,
}

impl Settings {
    /// A network that keeps nothing on disk.
    pub fn new(policy: Policy) -> Self {
        Self { policy, names: None, log: None, secrets: Vec::new(), outbound: Outbound::default() }
    }
}

/// The network of one running guest. Dropping it ends every connection.
#[derive(Debug)]
pub struct Network {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 3],
}

/// What came of a change of policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The digest of the policy before.
    pub old_digest: String,
    /// The digest of the policy now.
    pub new_digest: String,
    /// Connections that were ended because the policy does not allow them any more.
    pub closed_connections: usize,
}

/// What all connections of a guest share.
#[derive(Debug)]
pub(crate) struct Shared {
    policy: RwLock<Arc<Policy>>,
    names: Mutex<Names>,
    log: Mutex<Log>,
    /// Told of each entry.
    recorded: Notify,
    pub(crate) dialer: Dialer,
    pub(crate) secrets: Vec<HeldSecret>,
    /// Signs for the hosts whose TLS ends here; none: there is no such host.
    pub(crate) authority: Option<CertificateAuthority>,
    open: Mutex<Open>,
    queries: Arc<Semaphore>,
    new_names: Mutex<(Instant, u32)>,
}

/// Open connections, by number.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, (Arc<Opened>, oneshot::Sender<()>)>,
}

impl Network {
    /// Serves the sockets of a guest's namespace, on the tokio runtime of the caller.
    ///
    /// # Errors
    /// When the table of names or the log cannot be opened, or the sockets cannot be used.
    pub fn start(tcp: StdTcpListener, dns: UdpSocket, settings: Settings) -> io::Result<Self> {
        let names = match settings.names {
            Some(path) => Names::open(&path).map_err(io::Error::other)?,
            None => Names::new(),
        };
        let log = Log::open(settings.log, LOG_BYTES)?;
        let authority = authority(&settings.policy, &settings.secrets)?;
        tcp.set_nonblocking(true)?;
        let listener = TcpListener::from_std(tcp)?;
        let queries = Queries::new(dns)?;
        let shared = Arc::new(Shared {
            policy: RwLock::new(Arc::new(settings.policy)),
            names: Mutex::new(names),
            log: Mutex::new(log),
            recorded: Notify::new(),
            dialer: Dialer::new(settings.outbound),
            secrets: settings.secrets,
            authority,
            open: Mutex::default(),
            queries: Arc::new(Semaphore::new(QUERIES)),
            new_names: Mutex::new((Instant::now(), 0)),
        });
        shared.note_policy("the network began");
        let tasks = [
            tokio::spawn(accept(Arc::clone(&shared), listener)).abort_handle(),
            tokio::spawn(queries.serve(Arc::clone(&shared))).abort_handle(),
            tokio::spawn(write_counts(Arc::clone(&shared))).abort_handle(),
        ];
        Ok(Self { shared, tasks })
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    #[cfg(test)]
    pub(crate) fn shared_again(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// What the guest may reach now.
    pub fn policy(&self) -> Arc<Policy> {
        self.shared.policy()
    }

    /// Has the guest reach what another policy allows. Open connections that it does not allow are reset.
    pub fn set_policy(&self, policy: Policy) -> Changed {
        let policy = Arc::new(policy);
        let old_digest = self.shared.policy().digest();
        *self.shared.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&policy);
        // Connections are listed under the lock that this took, so each that the old policy allowed is on the list by now.
        self.shared.note_policy(&format!("it was {old_digest}"));
        let closed_connections = self.shared.close(|opened| !opened.is_allowed(&policy));
        Changed { old_digest, new_digest: policy.digest(), closed_connections }
    }

    /// The certificate that the guest must trust, as PEM, where TLS to some of its hosts ends here.
    pub fn authority(&self) -> Option<&str> {
        self.shared.authority.as_ref().map(CertificateAuthority::pem)
    }

    /// Counts of what the guest did.
    pub fn counts(&self) -> Counts {
        self.shared.log().counts()
    }

    /// A point in the sequence of denials, for [`Network::denials_since`].
    pub fn mark(&self) -> u64 {
        self.shared.log().mark()
    }

    /// What was denied since then, as far as it is remembered.
    pub fn denials_since(&self, mark: u64) -> Vec<Denial> {
        self.shared.log().denials_since(mark)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.close(|_| true);
        self.shared.log().finish();
    }
}

impl Shared {
    pub(crate) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does something under the policy of this moment, which does not change meanwhile.
    pub(crate) fn with_policy<T>(&self, work: impl FnOnce(&Policy) -> T) -> T {
        work(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an entry down.
    pub(crate) fn record(&self, entry: Entry) {
        self.log().record(entry, Instant::now());
        self.recorded.notify_one();
    }

    fn note_policy(&self, why: &str) {
        let policy = self.policy();
        let why = format!("policy {} ({}): {why}", policy.digest(), policy.mode().as_str());
        self.record(Entry { why: Some(why), ..Entry::now(Kind::Policy) });
    }

    /// Returns a permit to answer a query, or `None` if too many are being answered.
    pub(crate) fn query_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.queries).try_acquire_owned().ok()
    }

    /// Whether one more name may come into the table now.
    pub(crate) fn may_add_name(&self) -> bool {
        let mut count = self.new_names.lock().unwrap_or_else(PoisonError::into_inner);
        if count.0.elapsed() > NAMES_PERIOD {
            *count = (Instant::now(), 0);
        }
        count.1 += 1;
        count.1 <= NEW_NAMES
    }

    /// Ends open connections, and counts them.
    fn close(&self, which: impl Fn(&Opened) -> bool) -> usize {
        let mut open = self.open();
        let ended: Vec<u64> =
            open.connections.iter().filter(|(_, (to, _))| which(to)).map(|(number, _)| *number).collect();
        for number in &ended {
            if let Some((_, end)) = open.connections.remove(number) {
                // One that has just ended by itself does not hear it.
                _ = end.send(());
            }
        }
        ended.len()
    }

    /// Puts a connection on the list of those that can be ended.
    pub(crate) fn enlist(&self, opened: Arc<Opened>) -> (u64, oneshot::Receiver<()>) {
        let (end, ended) = oneshot::channel();
        let mut open = self.open();
        open.next += 1;
        let number = open.next;
        open.connections.insert(number, (opened, end));
        (number, ended)
    }

    /// Takes a connection that has ended off the list.
    pub(crate) fn delist(&self, number: u64) {
        self.open().connections.remove(&number);
    }
}

/// The authority for the hosts whose TLS ends here, if there is one.
fn authority(policy: &Policy, secrets: &[HeldSecret]) -> io::Result<Option<CertificateAuthority>> {
    let hosts = secrets.iter().flat_map(|held| &held.secret.hosts).chain(policy.inspect().keys());
    let domains: std::collections::BTreeSet<String> = hosts.map(HostPattern::domain).collect();
    if domains.is_empty() {
        return Ok(None);
    }
    CertificateAuthority::new(domains).map(Some).map_err(io::Error::other)
}

/// The right to have a connection: as many as this process has descriptors for, whichever of its guests they are of.
fn slots() -> &'static Arc<Semaphore> {
    static SLOTS: OnceLock<Arc<Semaphore>> = OnceLock::new();
    SLOTS.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let most = limit.saturating_sub(DESCRIPTORS_KEPT) / DESCRIPTORS_EACH;
        Arc::new(Semaphore::new(most.clamp(16, CONNECTIONS * 8)))
    })
}

/// Accepts connections for ever. They end when this ends.
async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((guest, _)) => match Arc::clone(slots()).try_acquire_owned() {
                    Ok(slot) if connections.len() < CONNECTIONS => {
                        let shared = Arc::clone(&shared);
                        connections.spawn(async move {
                            connect::serve(shared, guest).await;
                            drop(slot);
                        });
                    }
                    _ => reset(&guest),
                },
                // The guest has gone, or there are no descriptors.
                Err(_) => tokio::time::sleep(NO_DESCRIPTORS).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Writes what was counted and not yet written; an idle guest wakes nobody.
async fn write_counts(shared: Arc<Shared>) {
    loop {
        shared.recorded.notified().await;
        tokio::time::sleep(LOG_PERIOD).await;
        shared.log().flush(Instant::now());
    }
}
