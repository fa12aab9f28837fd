//! Listening sockets: binding them inside the leased range, and accepting under every circumstance.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{Config, Listen, Role};
use crate::congestion::Congestion;
use crate::connection::lock;
use crate::control::MOST_CLIENTS;
use crate::errno;
use crate::pipe::LEAST_PIPES;
use crate::relay::{Listener, NO_PEERS, Relay};
use crate::socket::{TcpListener, prepare, watch};
use crate::timer;
use crate::workers::{DESCRIPTORS_OF_A_RUNTIME, Workers};
use crate::{carry, cons, prod};

const BACKLOG: i32 = 4096;
/// Connections whose key is not proven yet, in total; one source has a quarter of the places at most.
const MOST_HALF_OPEN: u64 = 512;
/// The same from addresses that a peer has named or has proven its key from: all connections of a stream come from its few
/// gateways, and many may come at once.
const MOST_HALF_OPEN_KNOWN: u64 = 8192;
/// Descriptors for both at least; below, strangers could keep the peers waiting.
const LEAST_HALF_OPEN: u64 = 64;
/// Descriptors of a relay that has no listeners, workers or connections, generously.
const DESCRIPTORS_OF_ITS_OWN: u64 = 16;
/// A port that the kernel has chosen on one address may be taken on the other; then it chooses again.
const KERNEL_CHOICES: u32 = 64;
/// After a shortage of descriptors or memory, how long accepting pauses.
const PAUSE: Duration = Duration::from_millis(100);

/// Why no socket could be bound: the code and errno of the `failed` event, and words.
#[derive(Debug)]
pub struct BindError {
    pub code: &'static str,
    pub errno: String,
    pub message: String,
}

/// Binds one port for each index, on every address, and listens on it. All or nothing: an error closes what was bound.
pub fn bind(
    listen: &Listen,
    congestion: &Congestion,
    user_timeout: Duration,
) -> Result<Vec<(Arc<Listener>, StdListener)>, BindError> {
    let mut taken = HashSet::new();
    let mut bound = Vec::new();
    for &index in &listen.indices {
        let sockets = bind_one(listen, index, &mut taken, congestion, user_timeout)?;
        let open = Arc::new(AtomicU64::new(0));
        bound.extend(sockets.into_iter().map(|(address, socket)| {
            let listener = Listener {
                index,
                address,
                open: open.clone(),
                active: AtomicU64::new(0),
                accepted: AtomicU64::new(0),
                refused: AtomicU64::new(0),
                has_said_not_ready: AtomicBool::new(false),
                held: AtomicU64::new(0),
            };
            (Arc::new(listener), socket)
        }));
    }
    Ok(bound)
}

fn bind_one(
    listen: &Listen,
    index: u16,
    taken: &mut HashSet<u16>,
    congestion: &Congestion,
    user_timeout: Duration,
) -> Result<Vec<(SocketAddr, StdListener)>, BindError> {
    let kernel_chooses = listen.first_port == 0;
    let count =
        if kernel_chooses { KERNEL_CHOICES } else { u32::from(listen.last_port - listen.first_port) + 1 };
    // A random start keeps two relays on one range from racing for the same ports.
    let start = fastrand::u32(..count);
    let mut last = None;
    for step in 0..count {
        let port = if kernel_chooses { 0 } else { listen.first_port + ((start + step) % count) as u16 };
        if taken.contains(&port) {
            continue;
        }
        match open_all(listen.addresses(), port, congestion, user_timeout) {
            Ok(sockets) => {
                taken.extend(sockets.iter().map(|(address, _)| address.port()));
                return Ok(sockets);
            }
            // Somebody else's port; the next one may be free.
            Err((_, error)) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
            Err((address, error)) => {
                return Err(BindError {
                    code: "bind",
                    errno: errno::of(&error),
                    message: format!("cannot listen on {address}: {error}"),
                });
            }
        }
    }
    let addresses = listen.addresses().iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" and ");
    Err(BindError {
        code: "ports-exhausted",
        errno: last.as_ref().map_or("EADDRINUSE".into(), errno::of),
        message: format!(
            "no port of {addresses}:{}-{} is free for listener {index}: {} are wanted",
            listen.first_port,
            listen.last_port,
            listen.indices.len()
        ),
    })
}

/// One port on every address. Of port 0 the first address makes a number, and the others follow.
fn open_all(
    addresses: &[IpAddr],
    mut port: u16,
    congestion: &Congestion,
    user_timeout: Duration,
) -> Result<Vec<(SocketAddr, StdListener)>, (SocketAddr, io::Error)> {
    let mut sockets = Vec::new();
    for &address in addresses {
        let wanted = SocketAddr::new(address, port);
        let (address, socket) = open(wanted, congestion, user_timeout)
            .and_then(|socket| Ok((socket.local_addr()?, socket)))
            .map_err(|error| (wanted, error))?;
        port = address.port();
        sockets.push((address, socket));
    }
    Ok(sockets)
}

fn open(address: SocketAddr, congestion: &Congestion, user_timeout: Duration) -> io::Result<StdListener> {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    // Ports of ended streams are in TIME_WAIT; they are ours to use again.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Exactly the address that was admitted, and not IPv4 through it.
        socket.set_only_v6(true)?;
    }
    congestion.begin(&socket);
    prepare(&socket)?;
    // What is accepted inherits all of it, before anybody can know of it. The warning is given where connections are accepted.
    let _ = watch(&socket, user_timeout);
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The descriptors that a relay of this configuration may come to need, and may have at most (None: any number).
///
/// Its worst case is every listener full, each worker's few pipes in use, and somebody at each place of the control socket.
/// More pipes are not counted, because without them bytes are copied.
pub fn descriptors(config: &Config, workers: usize) -> (u64, Option<u64>) {
    let indices = config.listen.indices.len() as u64;
    let sockets = indices * config.listen.addresses().len() as u64;
    let of_a_worker = DESCRIPTORS_OF_A_RUNTIME + 2 * LEAST_PIPES as u64;
    let needed = DESCRIPTORS_OF_ITS_OWN
        + LEAST_HALF_OPEN
        + MOST_CLIENTS as u64
        + sockets
        + workers as u64 * of_a_worker
        + 2 * indices * u64::from(config.max_connections);
    (needed, rustix::process::getrlimit(rustix::process::Resource::Nofile).current)
}

/// The pipes that may be open at once: each worker's few, and half of what the limit leaves beyond the worst case, in which no
/// connection is missing a descriptor for a pipe's sake. `needed` and `limit` are of `descriptors`.
pub fn most_pipes(descriptors: (u64, Option<u64>), workers: usize) -> usize {
    workers * LEAST_PIPES + spare_pipes(descriptors) as usize
}

fn spare_pipes((needed, limit): (u64, Option<u64>)) -> u64 {
    limit.unwrap_or(u64::MAX).saturating_sub(needed) / 4
}

/// Accepts until the relay drains or ends. No error ends it: a shortage pauses it, anything else concerns one connection.
pub async fn serve(
    relay: Arc<Relay>,
    workers: Arc<Workers>,
    half_open: Arc<HalfOpen>,
    listener: Arc<Listener>,
    socket: TcpListener,
) {
    if let Err(error) = watch(&socket, relay.user_timeout()) {
        relay.warn_of_keepalive(&error);
    }
    let closes = relay.closes_listeners();
    tokio::pin!(closes);
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = &mut closes => return,
        };
        let admitted = accepted
            .and_then(|(stream, source)| admit(&relay, &workers, &listener, &half_open, stream, source));
        match admitted {
            Ok(()) => {}
            Err(error) if errno::is_shortage(&error) => {
                relay.say_shortage(&error);
                tokio::select! {
                    () = timer::sleep(PAUSE) => {}
                    () = &mut closes => return,
                }
            }
            // ECONNABORTED and its like: that client is gone, the next one is not.
            Err(_) => {}
        }
    }
}

/// Turns a connection away with a reset, or gives it a task of its own: nothing of a handshake runs in the accept loop. The
/// error is of a worker that cannot take it.
fn admit(
    relay: &Arc<Relay>,
    workers: &Workers,
    listener: &Arc<Listener>,
    half_open: &Arc<HalfOpen>,
    stream: TcpStream,
    source: SocketAddr,
) -> io::Result<()> {
    let cause = if relay.config.role == Role::Prod && !relay.has_peers() {
        Some(NO_PEERS)
    } else if !relay.admits_source(source.ip()) {
        Some("source")
    } else {
        None
    };
    if let Some(cause) = cause {
        relay.refuse(listener, cause, source.ip());
        return Ok(());
    }
    let (relay, listener) = (relay.clone(), listener.clone());
    match relay.config.role {
        Role::Prod => {
            let free = relay.free_connections();
            let Some(ticket) = half_open.enter(source.ip(), relay.knows_source(source.ip()), free) else {
                relay.refuse(&listener, "half-open", source.ip());
                return Ok(());
            };
            workers.spawn(stream, move |stream| {
                carry::serve(prod::begin(relay, listener, stream, source, ticket))
            })
        }
        Role::Cons => {
            let Some(active) = Active::enter(&listener, relay.config.max_connections) else {
                relay.refuse(&listener, "busy", source.ip());
                return Ok(());
            };
            workers.spawn(stream, move |stream| carry::serve(cons::begin(relay, active, stream, source)))
        }
    }
}

/// Counts one active connection of a listener until it is dropped.
pub struct Active(Arc<Listener>);

impl Active {
    /// None when the listener has `most` over all addresses of its index. Counted and compared in one step: several workers ask.
    pub fn enter(listener: &Arc<Listener>, most: u32) -> Option<Active> {
        let one_more = |open| (open < u64::from(most)).then_some(open + 1);
        listener.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        listener.active.fetch_add(1, Ordering::Relaxed);
        listener.accepted.fetch_add(1, Ordering::Relaxed);
        Some(Active(listener.clone()))
    }

    pub fn listener(&self) -> &Listener {
        &self.0
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who has not proven a key yet. Those from a known address are counted apart, so that strangers cannot take their places.
pub struct HalfOpen(Mutex<[Waiting; 2]>);

struct Waiting {
    most: u64,
    most_from_one_source: u64,
    total: u32,
    by_source: HashMap<IpAddr, u32>,
}

/// One place among them, until it is dropped.
pub struct Ticket {
    half_open: Arc<HalfOpen>,
    source: IpAddr,
    known: bool,
}

impl HalfOpen {
    /// No more than descriptors allow when everything else is in use, as `descriptors` counts them. Connections that
    /// are free have descriptors of their own: known ones may wait for them.
    pub fn new(descriptors: (u64, Option<u64>)) -> HalfOpen {
        let (needed, limit) = descriptors;
        let in_use = needed - LEAST_HALF_OPEN + 2 * spare_pipes(descriptors);
        let spare = limit.unwrap_or(u64::MAX).saturating_sub(in_use);
        let strangers = MOST_HALF_OPEN.min(spare / 2);
        let known = spare - strangers;
        HalfOpen(Mutex::new([Waiting::new(strangers, strangers.div_ceil(4)), Waiting::new(known, known)]))
    }

    /// None when too many are in front of the door, in total or from this source. `free`: connections that may still be opened.
    fn enter(self: &Arc<Self>, source: IpAddr, known: bool, free: u64) -> Option<Ticket> {
        let mut groups = lock(&self.0);
        let waiting = &mut groups[usize::from(known)];
        let from_source = waiting.by_source.get(&source).copied().unwrap_or(0);
        let full = if known {
            u64::from(waiting.total) >= waiting.most.saturating_add(free).min(MOST_HALF_OPEN_KNOWN)
        } else {
            u64::from(waiting.total) >= waiting.most || u64::from(from_source) >= waiting.most_from_one_source
        };
        if full {
            return None;
        }
        waiting.total += 1;
        waiting.by_source.insert(source, from_source + 1);
        Some(Ticket { half_open: self.clone(), source, known })
    }
}

impl Waiting {
    fn new(most: u64, most_from_one_source: u64) -> Waiting {
        Waiting { most, most_from_one_source, total: 0, by_source: HashMap::new() }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut groups = lock(&self.half_open.0);
        let waiting = &mut groups[usize::from(self.known)];
        waiting.total -= 1;
        if let Some(count) = waiting.by_source.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                waiting.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn of_workers_that_ask_at_the_same_moment_no_more_enter_than_may() {
        let listener = Arc::new(Listener {
            index: 0,
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            open: Arc::default(),
            active: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            has_said_not_ready: AtomicBool::new(false),
            held: AtomicU64::new(0),
        });
        let (workers, most, rounds) = (4, 2, 20_000);
        let barrier = Barrier::new(workers);
        let too_many = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        barrier.wait();
                        let active = Active::enter(&listener, most);
                        barrier.wait();
                        let over = listener.open.load(Ordering::Relaxed) - u64::from(most);
                        too_many.fetch_add(over, Ordering::Relaxed);
                        barrier.wait();
                        drop(active);
                    }
                });
            }
        });
        assert_eq!(too_many.load(Ordering::Relaxed), 0);
        assert_eq!(listener.open.load(Ordering::Relaxed), 0);
    }
}
