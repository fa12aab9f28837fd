//! What one relay is: its configuration, its keys, and the state that listeners, connections, the supervisor and the control
//! socket share.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, RwLock};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use crate::config::{Changes, Config, Network, PROTOCOL, Peer, Probe, RelayId, Role};
use crate::confine::Confinement;
use crate::congestion::Congestion;
use crate::connection::{Connection, lock};
use crate::events::Events;
use crate::gauge;
use crate::key::{Identity, PublicKey};
use crate::ktls::{KernelTls, Unable};
use crate::pace;
use crate::preamble::Kind;
use crate::resumption::{self, Caller};
use crate::socket::TcpStream;

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    WaitingHello,
    Listening,
    Ready,
    Streaming,
    Draining,
    Ended,
    Failed,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Finished,
    Released,
    LeaseExpired,
    LifetimeReached,
    HelloTimeout,
    AbortedByProducer,
    AbortedByConsumer,
    TargetUnreachable,
    PeerRejected,
    RelayLost,
    Admin,
}

impl Reason {
    /// Whether an end for this reason is one that somebody wanted.
    pub fn state(self) -> State {
        match self {
            Reason::Finished
            | Reason::Released
            | Reason::LeaseExpired
            | Reason::LifetimeReached
            | Reason::Admin => State::Ended,
            _ => State::Failed,
        }
    }
}

/// One attempt to get through to the other side, as `status` reports it.
#[derive(Clone, Debug)]
pub struct ProbeResult {
    pub result: &'static str,
    pub errno: Option<String>,
    pub address: Option<SocketAddr>,
    pub at: Instant,
}

/// How a relay ended.
#[derive(Clone, Debug)]
pub struct End {
    pub reason: Reason,
    pub message: Option<String>,
    /// The drain deadline cut connections.
    pub cut: bool,
}

/// The counters of one listening socket.
#[derive(Debug)]
pub struct Listener {
    pub index: u16,
    pub address: SocketAddr,
    /// Active connections of the index, over all its addresses.
    pub open: Arc<AtomicU64>,
    pub active: AtomicU64,
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    /// A probe has been told that there is no target yet: the next ones wait for one.
    pub has_said_not_ready: AtomicBool,
    /// So many do.
    pub held: AtomicU64,
}

pub struct Relay {
    pub config: Config,
    pub identity: Identity,
    pub events: Arc<Events>,
    pub listeners: Vec<Arc<Listener>>,
    confinement: Confinement,
    /// For each peer that was called.
    callers: Mutex<Vec<Arc<Caller>>>,
    /// What the kernel's TLS can do for mode `tls`.
    pub kernel_tls: Result<KernelTls, Unable>,
    pub congestion: Congestion,
    /// The keys that a handshake admits at this moment.
    pub admitted: Arc<RwLock<Vec<PublicKey>>>,
    /// Wakes the supervisor before its next tick.
    pub wake: Notify,
    /// The supervisor looks seldom, until a connection wakes it.
    at_rest: AtomicBool,
    /// Wakes the prober: peers have changed, or a lease is to be passed on.
    pub probe_wake: Notify,
    /// Wakes whoever waits for what an update may bring.
    changed: Notify,
    /// One probe of a target at a time.
    pub probing: tokio::sync::Mutex<()>,
    server_config: Arc<ServerConfig>,
    started: Instant,
    live: Mutex<Live>,
    accepting: watch::Sender<bool>,
    ended: watch::Sender<Option<End>>,
    /// The end record, once everything is closed.
    pub record: watch::Sender<Option<Value>>,
    next_connection: AtomicU64,
    warned_of_keepalive: Once,
}

/// Why a connection is turned away before `update` has brought the peers.
pub const NO_PEERS: &str = "no-peers";

/// A stream comes from its few gateways; a peer with ever new addresses gets no memory for them.
const MOST_PROVEN_SOURCES: usize = 256;

/// What changes while the relay lives.
struct Live {
    targets: Vec<SocketAddr>,
    peers: Vec<Peer>,
    peers_changed: u64,
    /// The addresses from which a key has been proven; one that must come from elsewhere by now does not count.
    proven_sources: HashMap<IpAddr, PublicKey>,
    sources: Vec<Network>,
    rate_mbits_per_s: u64,
    lease: Duration,
    lease_end: Instant,
    /// Until when the far relay is to live, while it has not been told.
    lease_to_pass_on: Option<Instant>,
    hello_end: Option<Instant>,
    proof: Option<Probe>,
    probed_listeners: BTreeMap<u16, Probe>,
    last_probe: Option<ProbeResult>,
    kept: HashMap<SocketAddr, Kept>,
    proven_targets: Vec<SocketAddr>,
    drain_end: Option<Instant>,
    drain_reason: Reason,
    connections: BTreeMap<u64, Arc<Connection>>,
    total: u64,
    refused: u64,
    refusals: HashMap<&'static str, (u64, IpAddr)>,
    first_abort: Option<(Reason, String)>,
    aborted: u64,
    carried: Carried,
    last_close: Option<Instant>,
    said: Option<State>,
}

/// The connection that a probe has made to a target, until its first user comes.
pub struct Kept {
    pub stream: TcpStream,
    since: Instant,
    /// How long after it was made the application's end was seen.
    pub closed_after: Option<Duration>,
}

/// Bytes of connections that have closed.
#[derive(Clone, Copy, Debug, Default)]
struct Carried {
    to_consumer: u64,
    to_producer: u64,
}

impl Relay {
    pub fn new(
        config: Config,
        identity: Identity,
        events: Arc<Events>,
        listeners: Vec<Arc<Listener>>,
        confinement: Confinement,
        kernel_tls: Result<KernelTls, Unable>,
        congestion: Congestion,
    ) -> Result<Relay, rustls::Error> {
        let now = Instant::now();
        let lease = Duration::from_secs_f64(config.lease_s.min(config.lifetime_s));
        let admitted = Arc::new(RwLock::new(config.peers.iter().map(|peer| peer.public_key).collect()));
        Ok(Relay {
            server_config: resumption::server(&identity, admitted.clone())?,
            admitted,
            probing: tokio::sync::Mutex::new(()),
            accepting: watch::Sender::new(true),
            record: watch::Sender::new(None),
            wake: Notify::new(),
            probe_wake: Notify::new(),
            changed: Notify::new(),
            started: now,
            live: Mutex::new(Live {
                targets: config.targets.clone(),
                peers: config.peers.clone(),
                peers_changed: 0,
                proven_sources: HashMap::new(),
                sources: config.sources.clone(),
                rate_mbits_per_s: config.rate_mbits_per_s,
                lease,
                lease_end: now + lease,
                lease_to_pass_on: None,
                hello_end: Some(now + Duration::from_secs_f64(config.hello_timeout_s)),
                proof: None,
                probed_listeners: BTreeMap::new(),
                last_probe: None,
                kept: HashMap::new(),
                proven_targets: Vec::new(),
                drain_end: None,
                drain_reason: Reason::Released,
                connections: BTreeMap::new(),
                total: 0,
                refused: 0,
                refusals: HashMap::new(),
                first_abort: None,
                aborted: 0,
                carried: Carried::default(),
                last_close: None,
                said: None,
            }),
            ended: watch::Sender::new(None),
            at_rest: AtomicBool::new(false),
            next_connection: AtomicU64::new(1),
            warned_of_keepalive: Once::new(),
            config,
            identity,
            events,
            listeners,
            confinement,
            callers: Mutex::default(),
            kernel_tls,
            congestion,
        })
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        lock(&self.live)
    }

    pub fn user_timeout(&self) -> Duration {
        self.config.user_timeout()
    }

    pub fn user_timeout_ms(&self) -> u32 {
        crate::socket::milliseconds(self.user_timeout())
    }

    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.config.connect_timeout_s)
    }

    pub fn handshake_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.config.handshake_timeout_s)
    }

    /// In which CONS wants PROD's answer: PROD may need its own connect time-out before it can give one.
    pub fn answer_timeout(&self) -> Duration {
        self.handshake_timeout() + self.connect_timeout()
    }

    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server_config.clone()
    }

    /// The connections to one peer share it: each keeps it to its end.
    pub fn caller(&self, pin: PublicKey) -> Result<Arc<Caller>, rustls::Error> {
        let mut callers = lock(&self.callers);
        if let Some(caller) = callers.iter().find(|caller| caller.pin == pin && caller.is_fresh()) {
            return Ok(caller.clone());
        }
        let caller = Arc::new(Caller::new(&self.identity, pin)?);
        callers.retain(|other| other.pin != pin);
        callers.push(caller.clone());
        Ok(caller)
    }

    // ---- who may connect, and where to ----

    /// The LAN sources of a CONS relay. On a PROD relay the configured sources, and those of each peer.
    pub fn admits_source(&self, address: IpAddr) -> bool {
        let live = self.live();
        live.names_source(address)
            // A key that may come from anywhere: the handshake decides. On a LAN there is none.
            || (self.config.role == Role::Prod && self.config.mode.proves_keys() && live.peers.iter().any(|peer| peer.source_addresses.is_empty()))
    }

    /// Somebody has named this address, or a peer that may come from anywhere has proven its key from there.
    pub fn knows_source(&self, address: IpAddr) -> bool {
        let live = self.live();
        live.names_source(address) || live.proven_sources.contains_key(&address)
    }

    /// A peer has proven its key from this address.
    pub fn proven_from(&self, key: PublicKey, address: IpAddr) {
        let mut live = self.live();
        if live.proven_sources.len() < MOST_PROVEN_SOURCES {
            live.proven_sources.insert(address, key);
        }
    }

    /// The proven key belongs to a peer that may come from this address.
    pub fn admits_peer(&self, key: PublicKey, address: IpAddr) -> bool {
        let live = self.live();
        live.peers.iter().filter(|peer| peer.public_key == key).any(|peer| {
            peer.source_addresses.is_empty()
                || peer.source_addresses.iter().any(|network| network.contains(address))
                || live.sources.iter().any(|network| network.contains(address))
        })
    }

    pub fn has_peers(&self) -> bool {
        !self.live().peers.is_empty()
    }

    /// Where listener `index` of a PROD relay leads.
    pub fn target(&self, index: u16) -> Option<SocketAddr> {
        let live = self.live();
        (!live.targets.is_empty()).then(|| live.targets[usize::from(index) % live.targets.len()])
    }

    /// The same, once there is one.
    pub async fn target_comes(&self, index: u16) -> SocketAddr {
        self.comes(|| self.target(index)).await
    }

    /// What an update may bring, once `look` finds it.
    async fn comes<T>(&self, look: impl Fn() -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }

    /// The PROD listener that LAN listener `index` of a CONS relay dials: the (index mod n)-th by its number.
    pub fn dial(&self, index: u16) -> Option<Dial> {
        let dials = self.dials();
        (!dials.is_empty()).then(|| dials[usize::from(index) % dials.len()].clone())
    }

    /// Every PROD listener, by its number.
    pub fn dials(&self) -> Vec<Dial> {
        let live = self.live();
        let mut dials: Vec<Dial> = live
            .peers
            .iter()
            .filter_map(|peer| peer.relay_id.map(|relay_id| (peer, relay_id)))
            .flat_map(|(peer, relay_id)| {
                peer.listeners.iter().map(move |listener| Dial {
                    relay_id,
                    public_key: peer.public_key,
                    index: listener.index,
                    address: listener.address,
                })
            })
            .collect();
        dials.sort_by_key(|dial| dial.index);
        dials
    }

    // ---- the connection that a probe leaves for the first user of a target ----

    /// A probe of this target needs no connection of its own: one is kept, or has been used already.
    pub fn is_proven(&self, target: SocketAddr) -> bool {
        self.live().proven_targets.contains(&target)
    }

    /// Keeps a probe's connection for the first data connection to the same target. Of two probes at a time one loses, and
    /// its connection closes.
    pub fn keep(&self, target: SocketAddr, stream: TcpStream) {
        let mut live = self.live();
        if live.targets.contains(&target) && !live.proven_targets.contains(&target) {
            live.proven_targets.push(target);
            let _ = crate::socket::watch(&stream, self.user_timeout());
            live.kept.insert(target, Kept { stream, since: Instant::now(), closed_after: None });
            drop(live);
            self.wake_from_rest();
        } else {
            crate::socket::close_in_order(&stream);
        }
    }

    pub fn take_kept(&self, target: SocketAddr) -> Option<Kept> {
        self.look_at_kept();
        self.live().kept.remove(&target)
    }

    /// Notes which applications have ended a kept connection; called at each tick.
    pub fn look_at_kept(&self) {
        for kept in self.live().kept.values_mut() {
            if kept.closed_after.is_none() && crate::socket::peer_has_closed(&kept.stream) {
                kept.closed_after = Some(kept.since.elapsed());
            }
        }
    }

    /// An application that never was used gets an ordinary close.
    pub fn drop_kept(&self) {
        for (_, kept) in self.live().kept.drain() {
            crate::socket::close_in_order(&kept.stream);
        }
    }

    // ---- probes ----

    /// The targets of a PROD relay that are to be proven from here: its path has been, and the targets have changed since.
    pub fn targets_to_prove(&self) -> Vec<SocketAddr> {
        let live = self.live();
        let path_proven = live.probed_listeners.len() == self.config.listen.indices.len();
        if self.config.role == Role::Cons || !path_proven || live.proof.is_some() {
            return Vec::new();
        }
        live.targets.clone()
    }

    /// A PROD relay has answered a probe of one of its listeners with ok.
    pub fn probed(&self, index: u16, kind: Kind) {
        let mut live = self.live();
        let proof = if kind == Kind::ProbeTarget { Probe::Target } else { Probe::Path };
        let held = live.probed_listeners.entry(index).or_insert(proof);
        if proof == Probe::Target {
            *held = Probe::Target;
        }
        if live.probed_listeners.len() == self.config.listen.indices.len() {
            let path_only = live.probed_listeners.values().any(|proof| *proof == Probe::Path);
            live.proof = Some(if path_only { Probe::Path } else { Probe::Target });
            live.hello_end = None;
        }
        drop(live);
        self.wake.notify_one();
    }

    /// Every PROD listener has answered a CONS relay.
    pub fn proven(&self, proof: Probe) {
        let mut live = self.live();
        live.proof = Some(proof);
        live.hello_end = None;
        drop(live);
        self.wake.notify_one();
    }

    /// CONS has got through to all peers that it had when they had changed so often. False: they are others by now.
    pub fn proven_of(&self, changes: u64, proof: Probe) -> bool {
        let mut live = self.live();
        if live.peers_changed != changes {
            return false;
        }
        live.proof = Some(proof);
        live.hello_end = None;
        drop(live);
        self.wake.notify_one();
        true
    }

    /// How often the peers have changed.
    pub fn peers_changed(&self) -> u64 {
        self.live().peers_changed
    }

    /// Returns once they have changed more often.
    pub async fn peers_change(&self, changes: u64) {
        self.comes(|| (self.peers_changed() != changes).then_some(())).await;
    }

    pub fn is_proven_through(&self) -> bool {
        self.live().proof.is_some()
    }

    pub fn note_probe(&self, result: ProbeResult) {
        self.live().last_probe = Some(result);
    }

    // ---- connections ----

    /// Registers an accepted connection.
    pub fn open(&self, listener: &Listener, source: SocketAddr) -> Arc<Connection> {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection::new(id, listener.index, source, self.config.role));
        self.live().connections.insert(id, connection.clone());
        connection
    }

    /// How many connections its listeners may still carry.
    pub fn free_connections(&self) -> u64 {
        let most = u64::from(self.config.max_connections);
        let addresses = self.config.listen.addresses().len();
        // The rows of an index stand together, and share what they count.
        self.listeners
            .iter()
            .step_by(addresses)
            .map(|listener| most.saturating_sub(listener.open.load(Ordering::Relaxed)))
            .sum()
    }

    /// Both sides are connected: from here on it counts as a data connection.
    pub fn streaming(&self, connection: &Connection) {
        let mut live = self.live();
        live.total += 1;
        live.hello_end = None;
        let first = live.total == 1;
        let (rate, connections) = (live.rate_mbits_per_s, live.connections.len());
        drop(live);
        if let Some(legs) = connection.legs().filter(|_| rate > 0) {
            pace::begin(&legs.wan, rate, connections);
        }
        self.events.emit_if_room("open", || connection.describe());
        if first || rate > 0 || self.at_rest.load(Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Removes a connection and adds it up. `reason` is None when it never was a data connection.
    pub fn close(&self, connection: &Connection, reason: Option<Closing>) {
        let mut live = self.live();
        if live.connections.remove(&connection.id).is_none() {
            return;
        }
        live.carried.to_consumer += connection.to_consumer().bytes();
        live.carried.to_producer += connection.to_producer().bytes();
        let Some(closing) = reason else { return };
        live.last_close = Some(Instant::now());
        if let Some(reason) = closing.abort {
            live.aborted += 1;
            live.first_abort.get_or_insert((reason, closing.text.clone().unwrap_or_default()));
        }
        let last = live.connections.is_empty();
        drop(live);
        self.events.emit_if_room("close", || {
            let mut fields = connection.describe();
            if let (Some(fields), Value::Object(account)) = (fields.as_object_mut(), connection.account()) {
                fields.extend(account);
            }
            fields["duration_s"] = json!(connection.opened.elapsed().as_secs_f64());
            fields["reason"] = json!(closing.reason);
            fields["errno"] = json!(closing.text);
            fields
        });
        if last {
            self.wake.notify_one();
        }
    }

    /// Counts a connection that was turned away; said once a second in sum, so that a scan does not fill the log.
    pub fn refuse(&self, listener: &Listener, cause: &'static str, source: IpAddr) {
        let mut live = self.live();
        // Before its peers are known a PROD relay turns its own CONS relay away: that is waiting, no refusal.
        if cause == NO_PEERS {
            return;
        }
        listener.refused.fetch_add(1, Ordering::Relaxed);
        live.refused += 1;
        self.is_to_say(live, cause, source);
    }

    /// Only the first is worth waking for: until it has been said a relay at rest does not sleep.
    fn is_to_say(&self, mut live: MutexGuard<'_, Live>, cause: &'static str, source: IpAddr) {
        let first = live.refusals.is_empty();
        let entry = live.refusals.entry(cause).or_insert((0, source));
        *entry = (entry.0 + 1, source);
        drop(live);
        if first {
            self.wake_from_rest();
        }
    }

    /// Says what was turned away since the last time; false if nothing was.
    pub fn say_refusals(&self) -> bool {
        let refusals = std::mem::take(&mut self.live().refusals);
        let any = !refusals.is_empty();
        for (cause, (count, source)) in refusals {
            self.events.emit("refused", json!({"cause": cause, "count": count, "last_source": source}));
        }
        any
    }

    /// The process or the system is out of descriptors or memory: said with the refusals, once a second at most.
    pub fn say_shortage(&self, error: &std::io::Error) {
        let nobody = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let cause = if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) {
            "EMFILE"
        } else {
            "shortage"
        };
        self.is_to_say(self.live(), cause, nobody);
    }

    /// There is something to watch or to say: a relay at rest may sleep for as long as its lease.
    fn wake_from_rest(&self) {
        if self.at_rest.load(Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Dead peers will be noticed late, or never: said once, and the connection goes on.
    pub fn warn_of_keepalive(&self, error: &std::io::Error) {
        self.warned_of_keepalive.call_once(|| {
            let message =
                "keepalive and TCP_USER_TIMEOUT cannot be set: a peer that vanishes is noticed late";
            self.events.emit("warning", json!({"errno": crate::errno::of(error), "message": message}));
        });
    }

    /// Whether there is nothing to look at until the next connection, which wakes: none now, and none has moved bytes since
    /// `bytes_seen` were counted.
    pub fn rests(&self, bytes_seen: u64) -> bool {
        self.at_rest.store(true, Ordering::Relaxed); // before looking: a connection that opens meanwhile wakes
        let connected = !self.live().connections.is_empty();
        let rests = !connected && self.bytes() == bytes_seen;
        self.at_rest.store(rests, Ordering::Relaxed);
        rests
    }

    /// Whether a relay at rest has nothing to do before its next deadline either: nothing to say, and no kept connection to watch.
    pub fn sleeps(&self) -> bool {
        let live = self.live();
        live.refusals.is_empty() && live.kept.is_empty()
    }

    /// All bytes so far, both ways.
    pub fn bytes(&self) -> u64 {
        let live = self.live();
        let closed = live.carried.to_consumer + live.carried.to_producer;
        closed + live.connections.values().map(|connection| connection.bytes()).sum::<u64>()
    }

    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.live().connections.values().cloned().collect()
    }

    // ---- lease and control ----

    /// Extends the lease, never beyond the lifetime. A CONS relay passes an explicit renewal on to PROD.
    pub fn renew(&self, lease_s: f64, pass_on: bool) {
        let mut live = self.live();
        live.lease = Duration::from_secs_f64(lease_s);
        live.lease_end = (Instant::now() + live.lease).min(self.lifetime_end());
        if pass_on && self.config.role == Role::Cons && self.config.mode.proves_keys() {
            live.lease_to_pass_on = Some(live.lease_end);
            self.probe_wake.notify_one();
        }
        drop(live);
        // It may end sooner than it would have.
        self.wake.notify_one();
    }

    /// Bytes have moved: the lease starts anew.
    pub fn touch(&self) {
        let mut live = self.live();
        live.lease_end = (Instant::now() + live.lease).min(self.lifetime_end()).max(live.lease_end);
    }

    /// A renewal by the far relay: it may lengthen what is left, and never shortens it.
    pub fn renew_from_peer(&self, lease_s: u32) {
        let mut live = self.live();
        let asked = Instant::now() + Duration::from_secs(lease_s.into());
        live.lease_end = asked.min(self.lifetime_end()).max(live.lease_end);
    }

    /// The lease, in seconds remaining, that the far relay has not been told of yet.
    pub fn lease_to_pass_on(&self) -> Option<(Instant, u32)> {
        let until = self.live().lease_to_pass_on?;
        Some((until, until.saturating_duration_since(Instant::now()).as_secs_f64().ceil() as u32))
    }

    /// The far relay has been told; a newer renewal stays to be told.
    pub fn passed_on(&self, until: Instant) {
        let mut live = self.live();
        if live.lease_to_pass_on == Some(until) {
            live.lease_to_pass_on = None;
        }
    }

    pub fn lease_remaining_s(&self) -> f64 {
        self.live().lease_end.saturating_duration_since(Instant::now()).as_secs_f64()
    }

    fn lifetime_end(&self) -> Instant {
        self.started + Duration::from_secs_f64(self.config.lifetime_s)
    }

    /// Applies checked changes. New targets at PROD and new peers at CONS have to be proven anew.
    pub fn update(&self, changes: Changes) {
        let mut live = self.live();
        let targets_changed = changes.targets.as_ref().is_some_and(|targets| *targets != live.targets);
        if let Some(targets) = changes.targets {
            live.targets = targets;
        }
        if targets_changed {
            let targets = live.targets.clone();
            live.proven_targets.retain(|target| targets.contains(target));
            live.kept.retain(|target, kept| {
                let stays = targets.contains(target);
                if !stays {
                    crate::socket::close_in_order(&kept.stream);
                }
                stays
            });
            if live.proof == Some(Probe::Target) {
                live.proof = None;
                // Who has streamed is not ended for a path that is not ready yet.
                live.hello_end = (live.total == 0)
                    .then(|| Instant::now() + Duration::from_secs_f64(self.config.hello_timeout_s));
            }
        }
        if let Some(peers) = changes.peers {
            if self.config.role == Role::Cons && live.proof.take().is_some() {
                live.hello_end = (live.total == 0)
                    .then(|| Instant::now() + Duration::from_secs_f64(self.config.hello_timeout_s));
            }
            *self.admitted.write().unwrap_or_else(|poisoned| poisoned.into_inner()) =
                peers.iter().map(|peer| peer.public_key).collect();
            let from_anywhere =
                |key| peers.iter().any(|peer| peer.public_key == key && peer.source_addresses.is_empty());
            live.proven_sources.retain(|_, key| from_anywhere(*key));
            lock(&self.callers).retain(|caller| peers.iter().any(|peer| peer.public_key == caller.pin));
            live.peers = peers;
            live.peers_changed += 1;
        }
        if let Some(sources) = changes.sources {
            live.sources = sources;
        }
        if let Some(rate) = changes.rate_mbits_per_s {
            live.rate_mbits_per_s = rate;
        }
        if let Some(lease_s) = changes.lease_s {
            live.lease = Duration::from_secs_f64(lease_s);
            live.lease_end = (Instant::now() + live.lease).min(self.lifetime_end());
        }
        drop(live);
        self.probe_wake.notify_one();
        self.changed.notify_waiters();
        self.wake.notify_one();
    }

    pub fn rate_mbits_per_s(&self) -> u64 {
        self.live().rate_mbits_per_s
    }

    /// Stops accepting; connections go on until `deadline`. A second drain can only shorten it.
    pub fn drain(&self, deadline: Duration, reason: Reason) {
        let mut live = self.live();
        let end = Instant::now() + deadline;
        if live.drain_end.is_none_or(|old| end < old) {
            live.drain_end = Some(end);
            live.drain_reason = reason;
        }
        drop(live);
        self.accepting.send_replace(false);
        self.wake.notify_one();
    }

    /// Returns when the listening sockets are to be closed.
    pub async fn closes_listeners(&self) {
        let mut accepting = self.accepting.subscribe();
        // The sender lives as long as self.
        let _ = accepting.wait_for(|accepting| !accepting).await;
    }

    pub fn is_draining(&self) -> bool {
        self.live().drain_end.is_some()
    }

    // ---- the end ----

    /// Ends the relay; the first end stays.
    pub fn end(&self, reason: Reason, message: Option<String>, cut: bool) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(End { reason, message, cut });
            first
        });
        self.accepting.send_replace(false);
    }

    /// Waits for the end.
    pub async fn ended(&self) -> End {
        let mut receiver = self.ended.subscribe();
        loop {
            if let Some(end) = receiver.borrow_and_update().clone() {
                return end;
            }
            // The sender lives as long as self.
            let _ = receiver.changed().await;
        }
    }

    /// Decides whether this relay has reached its end: called at each tick and after each event.
    pub fn consider(&self, now: Instant) {
        let live = self.live();
        let active = || live.connections.values().any(|connection| connection.is_connected());
        let verdict = if now >= self.lifetime_end() {
            Some((Reason::LifetimeReached, None, active()))
        } else if now >= live.lease_end {
            Some((Reason::LeaseExpired, None, active()))
        } else if let Some(end) = live.drain_end {
            if live.connections.is_empty() {
                Some((live.drain_reason, None, false))
            } else if now >= end {
                Some((live.drain_reason, Some("the drain deadline cut connections".into()), active()))
            } else {
                None
            }
        } else if live.hello_end.is_some_and(|end| now >= end) {
            let (reason, message) = live.why_not_ready(self.config.role);
            Some((reason, Some(message), active()))
        } else if self.config.until == crate::config::Until::Closed && self.has_closed(&live, now) {
            match &live.first_abort {
                Some((reason, text)) => Some((*reason, Some(text.clone()), false)),
                None => Some((Reason::Finished, None, false)),
            }
        } else {
            None
        };
        drop(live);
        if let Some((reason, message, cut)) = verdict {
            self.end(reason, message, cut);
        }
        self.say_state();
    }

    fn has_closed(&self, live: &Live, now: Instant) -> bool {
        live.connections.is_empty()
            && live.carried.to_consumer + live.carried.to_producer > 0
            && live.last_close.is_some_and(|at| (now - at).as_secs_f64() >= self.config.linger_s)
    }

    /// When the next decision is due by the clock; the supervisor sleeps no longer.
    pub fn next_deadline(&self) -> Instant {
        let live = self.live();
        let closing = live
            .last_close
            .filter(|_| self.config.until == crate::config::Until::Closed && live.connections.is_empty())
            .filter(|_| live.carried.to_consumer + live.carried.to_producer > 0)
            .map(|at| at + Duration::from_secs_f64(self.config.linger_s));
        [Some(self.lifetime_end()), Some(live.lease_end), live.hello_end, live.drain_end, closing]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(Instant::now)
    }

    // ---- what is said ----

    fn state_of(&self, live: &Live) -> State {
        if let Some(end) = &*self.ended.borrow() {
            end.reason.state()
        } else if live.drain_end.is_some() {
            State::Draining
        } else if live.total > 0 {
            State::Streaming
        } else if live.proof.is_some() {
            State::Ready
        } else if self.config.role == Role::Prod && live.targets.is_empty() {
            State::WaitingHello
        } else {
            State::Listening
        }
    }

    fn say_state(&self) {
        let mut live = self.live();
        let state = self.state_of(&live);
        if live.said != Some(state) {
            live.said = Some(state);
            drop(live);
            let reason = self.ended.borrow().as_ref().map(|end| end.reason);
            self.events.emit("state", json!({"state": state, "reason": reason}));
        }
    }

    /// The end record.
    pub fn end_record(&self, end: &End) -> Value {
        let live = self.live();
        json!({
            "relay_id": self.config.relay_id,
            "role": self.config.role,
            "mode": self.config.mode,
            "pid": std::process::id(),
            "state": end.reason.state(),
            "reason": end.reason,
            "message": end.message,
            "cut": end.cut,
            "bytes": {"to_consumer": live.carried.to_consumer, "to_producer": live.carried.to_producer},
            "connections": {"active": 0, "total": live.total, "refused": live.refused, "aborted": live.aborted, "kept": 0},
            "duration_s": self.started.elapsed().as_secs_f64(),
            "cpu_s": crate::resources::cpu_s(),
        })
    }

    /// The status document of docs/relay.md.
    pub fn status(&self) -> Value {
        let now = Instant::now();
        let live = self.live();
        let state = self.state_of(&live);
        let connections: Vec<Arc<Connection>> = live.connections.values().cloned().collect();
        let end = self.ended.borrow().clone();
        let mut bytes = live.carried;
        let mut rates = (0.0, 0.0);
        let mut gauges = Vec::new();
        let mut streams = Vec::new();
        let mut active = 0;
        for connection in &connections {
            bytes.to_consumer += connection.to_consumer().bytes();
            bytes.to_producer += connection.to_producer().bytes();
            let Some(legs) = connection.legs() else { continue };
            active += 1;
            let gauge = lock(&connection.gauge);
            let (to_consumer, to_producer) = gauge.bits_per_s();
            rates.0 += to_consumer;
            rates.1 += to_producer;
            if let Some(shares) = gauge.shares() {
                gauges.push((to_consumer + to_producer, shares));
            }
            let age_s = connection.opened.elapsed().as_secs_f64();
            let mut stream = connection.describe();
            if let (Some(stream), Value::Object(account)) = (stream.as_object_mut(), connection.account()) {
                stream.extend(account);
            }
            stream["age_s"] = json!(age_s);
            stream["half_closed"] = json!(connection.half_closed_for().is_some());
            stream["bits_per_s"] = json!({"to_consumer": to_consumer, "to_producer": to_producer});
            stream["legs"] =
                json!({"lan": gauge::leg(&legs.lan, age_s), "wan": gauge::leg(&legs.wan, age_s)});
            streams.push(stream);
        }
        let seconds = |at: Instant| at.saturating_duration_since(now).as_secs_f64();
        json!({
            "protocol": PROTOCOL,
            "relay_id": self.config.relay_id,
            "role": self.config.role,
            "mode": self.config.mode,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "state": state,
            "reason": end.as_ref().map(|end| end.reason),
            "message": end.as_ref().and_then(|end| end.message.clone()),
            "public_key": self.identity.public,
            "listeners": self.listeners.iter().map(|listener| json!({
                "index": listener.index,
                "address": listener.address,
                "active": listener.active.load(Ordering::Relaxed),
                "accepted": listener.accepted.load(Ordering::Relaxed),
                "refused": listener.refused.load(Ordering::Relaxed),
            })).collect::<Vec<_>>(),
            "targets": live.targets,
            "sources": live.sources,
            "peers": live.peers.iter().map(|peer| json!({"public_key": peer.public_key})).collect::<Vec<_>>(),
            "rate_mbits_per_s": live.rate_mbits_per_s,
            "proof": live.proof,
            "last_probe": live.last_probe.as_ref().map(|probe| json!({
                "result": probe.result,
                "errno": probe.errno,
                "address": probe.address,
                "age_s": probe.at.elapsed().as_secs_f64(),
            })),
            "uptime_s": self.started.elapsed().as_secs_f64(),
            "lease_remaining_s": seconds(live.lease_end),
            "lifetime_remaining_s": seconds(self.lifetime_end()),
            "hello_remaining_s": live.hello_end.map(seconds),
            "connections": {
                "active": active,
                "total": live.total,
                "refused": live.refused,
                "aborted": live.aborted,
                "kept": live.kept.len(),
            },
            "bytes": {"to_consumer": bytes.to_consumer, "to_producer": bytes.to_producer},
            "bits_per_s": {"to_consumer": rates.0, "to_producer": rates.1},
            "limiting": gauge::limiting(self.config.role, &gauges),
            "streams": streams,
            "confinement": self.confinement,
            "resources": crate::resources::report(),
        })
    }
}

impl Live {
    fn names_source(&self, address: IpAddr) -> bool {
        let named = |networks: &[Network]| networks.iter().any(|network| network.contains(address));
        named(&self.sources) || self.peers.iter().any(|peer| named(&peer.source_addresses))
    }

    /// Why no probe has passed in time, from the last one.
    fn why_not_ready(&self, role: Role) -> (Reason, String) {
        let last = self.last_probe.as_ref();
        let detail = |probe: &ProbeResult| {
            let address = probe.address.map(|address| address.to_string()).unwrap_or_default();
            let errno = probe.errno.as_deref().map(|errno| format!(" ({errno})")).unwrap_or_default();
            format!("{} {address}{errno}", probe.result)
        };
        match last {
            Some(probe) if probe.result == "unreachable" => (Reason::TargetUnreachable, detail(probe)),
            Some(probe) if probe.result == "peer-rejected" => (Reason::PeerRejected, detail(probe)),
            Some(probe) => (Reason::HelloTimeout, format!("the last probe: {}", detail(probe))),
            None if role == Role::Prod && self.targets.is_empty() => {
                (Reason::HelloTimeout, "no hello has named a target".into())
            }
            None if self.peers.is_empty() => (Reason::HelloTimeout, "no peers were given".into()),
            None => (Reason::HelloTimeout, "no relay has probed".into()),
        }
    }
}

/// One PROD listener as a CONS relay dials it.
#[derive(Clone, Debug)]
pub struct Dial {
    pub relay_id: RelayId,
    pub public_key: PublicKey,
    pub index: u16,
    pub address: SocketAddr,
}

/// Closes the books of a connection whose task ends without having done so: it has panicked.
pub struct Books(pub Arc<Relay>, pub Arc<Connection>);

impl Drop for Books {
    fn drop(&mut self) {
        self.1.disconnected();
        let text = Some("internal error".into());
        self.0.close(&self.1, Some(Closing { reason: "peer", abort: Some(Reason::RelayLost), text }));
    }
}

/// How a data connection ended.
pub struct Closing {
    pub reason: &'static str,
    /// Set when an application's abort, and not our own doing, ended it.
    pub abort: Option<Reason>,
    pub text: Option<String>,
}
