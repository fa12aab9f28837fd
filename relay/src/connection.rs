//! One relayed connection as everybody else sees it: its counters, its legs, and the hand that can end it.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::ops::Index;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::config::Role;
use crate::errno;
use crate::socket::TcpStream;

/// The two sockets of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leg {
    Lan,
    Wan,
}

impl Leg {
    pub fn other(self) -> Leg {
        match self {
            Leg::Lan => Leg::Wan,
            Leg::Wan => Leg::Lan,
        }
    }
}

/// Where and why a connection broke.
#[derive(Clone, Debug)]
pub struct LegError {
    pub leg: Leg,
    pub errno: i32,
    pub text: String,
}

impl LegError {
    pub fn new(leg: Leg, error: &io::Error) -> LegError {
        LegError { leg, errno: errno::number(error), text: errno::of(error) }
    }

    /// The other end of a leg is gone without a word of its own.
    pub fn silent(leg: Leg, text: &str) -> LegError {
        LegError { leg, errno: 0, text: text.into() }
    }

    /// A TLS error can only be the WAN's.
    pub fn tls(error: &rustls::Error) -> LegError {
        LegError { leg: Leg::Wan, errno: 0, text: error.to_string() }
    }
}

/// How the bytes of one direction travel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Path {
    Unused,
    Splice,
    Copy,
    TlsCopy,
    KtlsSplice,
    KtlsCopy,
}

impl Path {
    pub fn name(self) -> Option<&'static str> {
        match self {
            Path::Unused => None,
            Path::Splice => Some("splice"),
            Path::Copy => Some("copy"),
            Path::TlsCopy => Some("tls-copy"),
            Path::KtlsSplice => Some("ktls-splice"),
            Path::KtlsCopy => Some("ktls-copy"),
        }
    }
}

/// What a direction waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wait {
    /// Nothing has come in.
    Source,
    /// What came in finds no room.
    Destination,
}

/// For how long a direction has waited so far, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waited {
    pub source_ns: u64,
    pub destination_ns: u64,
}

/// A wait that is going on; it is added up when this is dropped, for whatever reason.
pub struct Waiting<'a>(&'a Flow);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Waiting(flow) = self;
        let for_destination = flow.waits_for_destination.load(Ordering::Relaxed);
        let counter = if for_destination { &flow.destination_ns } else { &flow.source_ns };
        counter.fetch_add(now_ns() - flow.waiting_since_ns.load(Ordering::Relaxed), Ordering::Relaxed);
        flow.waiting_since_ns.store(0, Ordering::Relaxed);
    }
}

/// Nanoseconds since some moment; never 0. By itself, because a message pays for two looks at the clock. Not the kernel's coarse
/// clock: waits in step with its ticks, as of frames every 4 ms, would all be none or all a whole tick.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64 + 1
}

/// One direction of one connection.
#[derive(Default)]
pub struct Flow {
    source_ns: AtomicU64,
    destination_ns: AtomicU64,
    /// 0 while it does not wait.
    waiting_since_ns: AtomicU64,
    waits_for_destination: AtomicBool,
    bytes: AtomicU64,
    path: AtomicU8,
    pipe_bytes: AtomicU32,
    no_splice: AtomicBool,
    long: AtomicBool,
    /// 0 until then.
    ended_ns: AtomicU64,
}

impl Flow {
    /// `count` bytes were accepted by the destination's kernel.
    pub fn add(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn has_moved(&self) -> bool {
        self.bytes() > 0
    }

    /// What the last round travelled in.
    pub fn took(&self, path: Path, pipe_bytes: usize) {
        self.path.store(path as u8, Ordering::Relaxed);
        self.pipe_bytes.store(pipe_bytes as u32, Ordering::Relaxed);
    }

    pub fn path(&self) -> Path {
        match self.path.load(Ordering::Relaxed) {
            1 => Path::Splice,
            2 => Path::Copy,
            3 => Path::TlsCopy,
            4 => Path::KtlsSplice,
            5 => Path::KtlsCopy,
            _ => Path::Unused,
        }
    }

    /// This kernel cannot splice these sockets.
    pub fn forbid_splice(&self) {
        self.no_splice.store(true, Ordering::Relaxed);
    }

    pub fn may_splice(&self) -> bool {
        !self.no_splice.load(Ordering::Relaxed)
    }

    /// Whether what comes next is expected to be little: what came last was, or nothing has come yet.
    pub fn is_short(&self) -> bool {
        !self.long.load(Ordering::Relaxed)
    }

    pub fn loaded(&self, short: bool) {
        self.long.store(!short, Ordering::Relaxed);
    }

    /// This direction waits from here on, until the answer is dropped.
    pub fn waits(&self, wait: Wait) -> Waiting<'_> {
        self.waits_for_destination.store(wait == Wait::Destination, Ordering::Relaxed);
        self.waiting_since_ns.store(now_ns(), Ordering::Relaxed);
        Waiting(self)
    }

    /// All waits so far, the present one included.
    pub fn waited(&self) -> Waited {
        let mut waited = Waited {
            source_ns: self.source_ns.load(Ordering::Relaxed),
            destination_ns: self.destination_ns.load(Ordering::Relaxed),
        };
        let since_ns = self.waiting_since_ns.load(Ordering::Relaxed);
        if since_ns > 0 {
            let present_ns = now_ns().saturating_sub(since_ns);
            if self.waits_for_destination.load(Ordering::Relaxed) {
                waited.destination_ns += present_ns;
            } else {
                waited.source_ns += present_ns;
            }
        }
        waited
    }

    /// The application ended this direction.
    pub fn end(&self) {
        self.ended_ns.store(now_ns(), Ordering::Relaxed);
    }

    /// For how long that has been so; None until then.
    fn ended_for(&self) -> Option<Duration> {
        let ended_ns = self.ended_ns.load(Ordering::Relaxed);
        (ended_ns > 0).then(|| Duration::from_nanos(now_ns().saturating_sub(ended_ns)))
    }
}

/// A connection from the moment it is accepted.
pub struct Connection {
    pub id: u64,
    pub listener: u16,
    pub source: SocketAddr,
    pub opened: Instant,
    role: Role,
    to_consumer: Flow,
    to_producer: Flow,
    onward: Mutex<Option<SocketAddr>>,
    /// After `opened`; 0 until then.
    first_byte_ns: AtomicU64,
    path_reason: OnceLock<Arc<str>>,
    legs: Mutex<Option<Arc<Legs>>>,
    gathered_lumps: AtomicU8,
    paused: [AtomicBool; 2],
    unsent: [AtomicBool; 2],
    cut: Mutex<Cut>,
    /// Kept by the supervisor: rates, idleness and what limits this connection.
    pub gauge: Mutex<crate::gauge::Gauge>,
}

pub struct Legs {
    pub lan: TcpStream,
    pub wan: TcpStream,
}

impl Index<Leg> for Legs {
    type Output = TcpStream;

    fn index(&self, leg: Leg) -> &TcpStream {
        match leg {
            Leg::Lan => &self.lan,
            Leg::Wan => &self.wan,
        }
    }
}

/// The hand that can end a connection, and the task that it is to wake.
#[derive(Default)]
struct Cut {
    reason: Option<&'static str>,
    task: Option<Waker>,
}

impl Connection {
    pub fn new(id: u64, listener: u16, source: SocketAddr, role: Role) -> Connection {
        Connection {
            id,
            listener,
            source,
            opened: Instant::now(),
            role,
            to_consumer: Flow::default(),
            to_producer: Flow::default(),
            onward: Mutex::new(None),
            first_byte_ns: AtomicU64::new(0),
            path_reason: OnceLock::new(),
            legs: Mutex::new(None),
            gathered_lumps: AtomicU8::new(0),
            paused: Default::default(),
            unsent: Default::default(),
            cut: Mutex::default(),
            gauge: Mutex::default(),
        }
    }

    pub fn to_consumer(&self) -> &Flow {
        &self.to_consumer
    }

    pub fn to_producer(&self) -> &Flow {
        &self.to_producer
    }

    /// The direction that enters at this relay's LAN socket.
    pub fn lan_to_wan(&self) -> &Flow {
        match self.role {
            Role::Prod => &self.to_consumer,
            Role::Cons => &self.to_producer,
        }
    }

    /// The direction that enters at this relay's WAN socket.
    pub fn wan_to_lan(&self) -> &Flow {
        match self.role {
            Role::Prod => &self.to_producer,
            Role::Cons => &self.to_consumer,
        }
    }

    pub fn is_producer_side(&self) -> bool {
        self.role == Role::Prod
    }

    /// A byte is about to be passed on.
    pub fn first_byte(&self) {
        if self.first_byte_ns.load(Ordering::Relaxed) == 0 {
            let past_ns = self.opened.elapsed().as_nanos().max(1) as u64;
            let _ = self.first_byte_ns.compare_exchange(0, past_ns, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Why the bytes of mode `tls` travel as they do.
    pub fn explain_path(&self, reason: Arc<str>) {
        let _ = self.path_reason.set(reason);
    }

    /// Both sockets are there, and bytes may flow.
    pub fn connected(&self, onward: SocketAddr, legs: Arc<Legs>) {
        *lock(&self.onward) = Some(onward);
        *lock(&self.legs) = Some(legs);
    }

    pub fn is_connected(&self) -> bool {
        lock(&self.legs).is_some()
    }

    pub fn legs(&self) -> Option<Arc<Legs>> {
        lock(&self.legs).clone()
    }

    /// Lets go of the sockets, so that they close now and not when the last reader of the status has finished.
    pub fn disconnected(&self) {
        lock(&self.legs).take();
    }

    /// Ends this connection with a reset, for a typed reason. The first reason stays.
    pub fn cut(&self, reason: &'static str) {
        let task = {
            let mut cut = lock(&self.cut);
            cut.reason.get_or_insert(reason);
            cut.task.take()
        };
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Waits until somebody cuts this connection. Its own task does, and no other: only one is woken.
    pub fn is_cut(&self) -> impl Future<Output = &'static str> {
        poll_fn(|context| {
            let mut cut = lock(&self.cut);
            if let Some(reason) = cut.reason {
                return Poll::Ready(reason);
            }
            if !cut.task.as_ref().is_some_and(|task| task.will_wake(context.waker())) {
                cut.task = Some(context.waker().clone());
            }
            Poll::Pending
        })
    }

    /// What the WAN brings uses the rate up: so much of it at once is worth waiting for; 0 is no waiting.
    pub fn gather(&self, lumps: u8) {
        self.gathered_lumps.store(lumps, Ordering::Relaxed);
    }

    pub fn gathers(&self) -> u8 {
        self.gathered_lumps.load(Ordering::Relaxed)
    }

    /// Notes whether the peer on `leg` has closed its window; true if that has changed.
    pub fn paused(&self, leg: Leg, paused: bool) -> bool {
        self.paused[leg as usize].swap(paused, Ordering::Relaxed) != paused
    }

    /// Notes whether bytes for the peer on `leg` are still in this relay's socket.
    pub fn has_unsent(&self, leg: Leg, unsent: bool) {
        self.unsent[leg as usize].store(unsent, Ordering::Relaxed);
    }

    /// A peer's window is closed, or may close while bytes wait for it, though no more come.
    pub fn may_pause(&self) -> bool {
        self.paused.iter().chain(&self.unsent).any(|flag| flag.load(Ordering::Relaxed))
    }

    pub fn bytes(&self) -> u64 {
        self.to_consumer.bytes() + self.to_producer.bytes()
    }

    /// For how long exactly one direction has ended; None while both or none have.
    pub fn half_closed_for(&self) -> Option<Duration> {
        self.to_consumer.ended_for().xor(self.to_producer.ended_for())
    }

    /// What an event says of this connection.
    pub fn describe(&self) -> Value {
        json!({
            "connection": self.id,
            "listener": self.listener,
            "source": self.source,
            "onward": *lock(&self.onward),
        })
    }

    /// What the end of this connection, and its row in the status, say in addition.
    pub fn account(&self) -> Value {
        let first_byte_ns = self.first_byte_ns.load(Ordering::Relaxed);
        json!({
            "bytes": {"to_consumer": self.to_consumer.bytes(), "to_producer": self.to_producer.bytes()},
            "path": {"to_consumer": self.to_consumer.path().name(), "to_producer": self.to_producer.path().name()},
            "path_reason": self.path_reason.get().map(|reason| &**reason),
            "first_byte_s": (first_byte_ns > 0).then_some(first_byte_ns as f64 / 1e9),
            "pipe_bytes": self
                .to_consumer
                .pipe_bytes
                .load(Ordering::Relaxed)
                .max(self.to_producer.pipe_bytes.load(Ordering::Relaxed)),
        })
    }
}

/// A panic elsewhere must not make the status unreadable: what these locks guard is always whole.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
