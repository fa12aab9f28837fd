//! Carries the bytes of one connection without looking at them: the kernel moves them from socket to pipe to socket, and this
//! process never sees them.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use tokio::io::Interest;
use tokio::sync::Notify;

use crate::connection::{Connection, Flow, Leg, LegError, Legs, Path, Wait};
use crate::gather::gather;
use crate::pipe::{BUFFER_BYTES, PIPE_BYTES, Pipe, give_buffer, give_pipe, take_buffer, take_pipe};
use crate::socket::{TcpStream, close_in_order, shutdown_write};
use crate::timer;

/// A source that has been reset may still have bytes on their way to a reader that reads; a reader that takes nothing for this
/// long will not miss them.
pub const FLUSH: Duration = Duration::from_secs(5);

/// How often a busy direction moves bytes before the other connections of its thread get a turn: a few MiB. Fewer cost CPU for
/// each byte, more let a ping beside a bulk transfer wait.
const ROUNDS_A_TURN: u8 = 8;

/// What is shorter than this is cheaper copied than spliced, and more often than not followed by its like.
const SHORT_BYTES: usize = 4 << 10;
/// So much is copied when something short is expected; what fills it was not.
const SHORT_READ_BYTES: usize = 16 << 10;

/// What a direction finds when it looks at its source.
pub enum Load {
    Cargo(Cargo, usize),
    /// Not now.
    Nothing,
    /// The source has ended its direction in order.
    End,
}

/// How the WAN leg says what it says: in clear text, or in TLS that the kernel speaks.
pub trait Wire: Sync {
    const SPLICED: Path;
    const COPIED: Path;
    /// What says that the WAN may have something. Clear text fails with an end or a reset, and both can be read.
    const HAS_COME: Interest = Interest::READABLE;

    /// Takes what the WAN has.
    fn load(&self, wan: &TcpStream, flow: &Flow) -> Result<Load, LegError>;

    /// Whether `prepare` is to be called before the next call that gives bytes to the WAN; asked before each.
    fn wants_to_prepare(&self, wan: &TcpStream) -> Result<bool, LegError>;

    async fn prepare(&self, wan: &TcpStream) -> Result<(), LegError>;

    /// Called when the WAN takes nothing now.
    fn push(&self, wan: &TcpStream);

    /// Tells the peer that nothing more comes.
    async fn end(&self, wan: &TcpStream) -> Result<(), LegError>;

    /// Waits until a close takes nothing along of what the peer is still to get.
    async fn settle(&self, wan: &TcpStream, sent_bytes: u64) -> Result<(), LegError>;
}

pub struct Clear;

impl Wire for Clear {
    const SPLICED: Path = Path::Splice;
    const COPIED: Path = Path::Copy;

    fn load(&self, wan: &TcpStream, flow: &Flow) -> Result<Load, LegError> {
        Cargo::load(wan, flow, (Path::Splice, Path::Copy)).map_err(|error| LegError::new(Leg::Wan, &error))
    }

    fn wants_to_prepare(&self, _wan: &TcpStream) -> Result<bool, LegError> {
        Ok(false)
    }

    async fn prepare(&self, _wan: &TcpStream) -> Result<(), LegError> {
        Ok(())
    }

    fn push(&self, _wan: &TcpStream) {}

    async fn end(&self, wan: &TcpStream) -> Result<(), LegError> {
        shutdown_write(wan).map_err(|error| LegError::new(Leg::Wan, &error))
    }

    async fn settle(&self, _wan: &TcpStream, _sent_bytes: u64) -> Result<(), LegError> {
        Ok(())
    }
}

/// What both directions of a connection share.
struct Ways<'a, W> {
    legs: &'a Legs,
    wire: &'a W,
    connection: &'a Connection,
    /// One of them has ended.
    one_ended: AtomicBool,
    both_ended: Notify,
}

/// Relays both ways until both applications have ended their direction, or the first error ends both at once. Closing is
/// orderly only in the first case; in the other, dropping the sockets resets them.
pub fn relay<'a, W: Wire>(
    legs: &'a Legs,
    wire: &'a W,
    connection: &'a Connection,
) -> impl Future<Output = Result<(), LegError>> + 'a {
    let ways = Ways { legs, wire, connection, one_ended: AtomicBool::new(false), both_ended: Notify::new() };
    // A block, here and below: an idle connection would keep the arguments of an async function twice. And what it does not
    // wait for is in boxes: it keeps no memory for that.
    async move {
        let outward = connection.lan_to_wan();
        if outward.has_moved() {
            foretell(outward, (W::SPLICED, W::COPIED));
        }
        // Small pieces of memory fit between the large ones that sockets and tasks have at rounded addresses.
        let (outward, inward) = (Box::pin(one_way(&ways, Leg::Lan)), Box::pin(one_way(&ways, Leg::Wan)));
        tokio::try_join!(outward, inward)?;
        let Ways { legs, wire, connection, .. } = ways;
        Box::pin(wire.settle(&legs.wan, connection.lan_to_wan().bytes())).await?;
        close_in_order(&legs.lan);
        close_in_order(&legs.wan);
        Ok(())
    }
}

/// One direction, up to the end of its source. Invariant: the source is read only while nothing is under way, so EAGAIN from
/// the source can only mean that the source is empty, and EAGAIN from the destination that the destination is full.
fn one_way<'a, W: Wire>(ways: &'a Ways<'a, W>, from: Leg) -> impl Future<Output = Result<(), LegError>> + 'a {
    let to = from.other();
    async move {
        let mut rounds = 0;
        loop {
            {
                let _waiting = ways.flow(from).waits(Wait::Source);
                let has_come = if from == Leg::Wan && W::HAS_COME != Interest::READABLE {
                    Box::pin(ways.legs[from].ready(W::HAS_COME)).await.map(drop)
                } else {
                    // Nobody else waits for this socket to be readable; `ready()` would take memory for that, of every idle
                    // connection.
                    let mut gathering = None;
                    poll_fn(|context| {
                        let ready = ways.legs[from].poll_read_ready(context);
                        if ready.is_pending() {
                            rounds = 0; // the others have their turn
                            if from == Leg::Wan {
                                gather(&mut gathering, &ways.legs.wan, ways.connection, context);
                            }
                        }
                        ready
                    })
                    .await
                };
                has_come.map_err(|error| LegError::new(from, &error))?;
            }
            let (mut cargo, mut left) = match ways.load(from)? {
                Load::Cargo(cargo, length) => (cargo, length),
                Load::Nothing => continue,
                Load::End => break,
            };
            ways.connection.first_byte();
            while left > 0 {
                if to == Leg::Wan && ways.wire.wants_to_prepare(&ways.legs.wan)? {
                    Box::pin(ways.wire.prepare(&ways.legs.wan)).await?;
                }
                let moved = ways.unload(&mut cargo, to, left)?;
                left -= moved;
                if moved == 0 {
                    Box::pin(ways.wait_for_room(from)).await?;
                }
            }
            cargo.give_back();
            rounds += 1;
            if rounds == ROUNDS_A_TURN {
                rounds = 0;
                tokio::task::yield_now().await;
            }
        }
        Box::pin(ways.end(from)).await
    }
}

impl<W: Wire> Ways<'_, W> {
    fn flow(&self, from: Leg) -> &Flow {
        match from {
            Leg::Lan => self.connection.lan_to_wan(),
            Leg::Wan => self.connection.wan_to_lan(),
        }
    }

    /// Takes what a source has.
    fn load(&self, from: Leg) -> Result<Load, LegError> {
        match from {
            Leg::Lan => Cargo::load(&self.legs.lan, self.flow(from), (W::SPLICED, W::COPIED))
                .map_err(|error| LegError::new(from, &error)),
            Leg::Wan => self.wire.load(&self.legs.wan, self.flow(from)),
        }
    }

    /// How many of the bytes that are under way the destination takes; 0 if there is no room.
    fn unload(&self, cargo: &mut Cargo, to: Leg, left: usize) -> Result<usize, LegError> {
        match cargo.unload(&self.legs[to], left) {
            Ok(0) => Err(LegError::new(to, &io::ErrorKind::WriteZero.into())),
            Ok(moved) => {
                self.flow(to.other()).add(moved);
                Ok(moved)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(LegError::new(to, &error)),
        }
    }

    /// Waits until the destination takes bytes again. A source that is reset meanwhile gets a bounded time to be delivered.
    async fn wait_for_room(&self, from: Leg) -> Result<(), LegError> {
        let to = from.other();
        let (source, destination) = (&self.legs[from], &self.legs[to]);
        if to == Leg::Wan {
            self.wire.push(destination);
        }
        let _waiting = self.flow(from).waits(Wait::Destination);
        tokio::select! {
            biased;
            room = destination.writable() => room.map_err(|error| LegError::new(to, &error)),
            _ = source.ready(Interest::ERROR) => match timer::timeout(FLUSH, destination.writable()).await {
                Ok(room) => room.map_err(|error| LegError::new(to, &error)),
                Err(_) => Err(LegError::new(from, &Errno::CONNRESET.into())),
            },
        }
    }

    /// The source has ended its direction: the destination is told, and the source is read no more. Until the other direction
    /// has ended too, a reset of it must still be seen, or the other application would wait for one that is gone.
    async fn end(&self, from: Leg) -> Result<(), LegError> {
        self.flow(from).end();
        match from {
            Leg::Lan => self.wire.end(&self.legs.wan).await?,
            Leg::Wan => shutdown_write(&self.legs.lan).map_err(|error| LegError::new(Leg::Lan, &error))?,
        }
        if self.one_ended.swap(true, Ordering::Relaxed) {
            self.both_ended.notify_one();
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.both_ended.notified() => Ok(()),
            _ = self.legs[from].ready(Interest::ERROR) => Err(LegError::new(from, &Errno::CONNRESET.into())),
        }
    }
}

/// What bytes travel in between the two sockets. Dropped with bytes still in it, it takes them along: a pipe that is not empty
/// never goes back to the pool.
pub enum Cargo {
    Pipe(Pipe),
    /// And how many of its bytes have gone.
    Buffer(Vec<u8>, usize),
    /// The same, and the source has ended behind them: the end is what is loaded next.
    Last(Vec<u8>, usize),
}

impl Cargo {
    /// Takes what the source has, at most `PIPE_BYTES`. `paths` are what it is called if it was spliced, and if it was copied.
    fn load(source: &TcpStream, flow: &Flow, (spliced, copied_path): (Path, Path)) -> io::Result<Load> {
        if flow.is_short() {
            let mut copied = None;
            // Only in clear text: the kernel's TLS makes records of its own of what waits.
            let ends = spliced == Path::Splice && source.has_ended();
            return match (
                source.try_read_by(SHORT_READ_BYTES, || copy_in(source, SHORT_READ_BYTES, &mut copied)),
                copied,
            ) {
                (Ok(length), Some(buffer)) => {
                    flow.loaded(length < SHORT_BYTES);
                    if flow.path() != spliced {
                        foretell(flow, (spliced, copied_path));
                    }
                    let cargo = match ends && length < SHORT_READ_BYTES {
                        true => Cargo::Last(buffer, 0),
                        false => Cargo::Buffer(buffer, 0),
                    };
                    Ok(Load::Cargo(cargo, length))
                }
                (Ok(_), None) => Ok(Load::End),
                (Err(error), _) => nothing_or(error),
            };
        }
        if flow.may_splice() {
            if let Some(pipe) = take_pipe() {
                let mut copied = None;
                // splice stops in front of an urgent byte, as if there were nothing, or the end, behind it: only recv knows.
                let moved = source.try_io(Interest::READABLE, || match splice_in(source, &pipe) {
                    Ok(0) => copy_in(source, BUFFER_BYTES, &mut copied),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        copy_in(source, BUFFER_BYTES, &mut copied)
                    }
                    answer => answer,
                });
                match (moved, copied) {
                    (Ok(0), _) => {
                        give_pipe(pipe);
                        return Ok(Load::End);
                    }
                    (Ok(length), Some(buffer)) => {
                        give_pipe(pipe);
                        // A byte that came after the splice and before the recv travels like this too; that is no other path.
                        if flow.path() == Path::Unused {
                            flow.took(copied_path, 0);
                        }
                        return Ok(Load::Cargo(Cargo::Buffer(buffer, 0), length));
                    }
                    (Ok(length), None) => {
                        flow.took(spliced, pipe.granted_bytes);
                        flow.loaded(length < SHORT_BYTES);
                        return Ok(Load::Cargo(Cargo::Pipe(pipe), length));
                    }
                    // Nothing was taken, and recv will say what is wrong if it is something else.
                    (Err(error), _) if is_unsupported(&error) => {
                        give_pipe(pipe);
                        flow.forbid_splice();
                    }
                    (Err(error), _) => {
                        give_pipe(pipe);
                        return nothing_or(error);
                    }
                }
            }
        }
        let mut buffer = take_buffer();
        match source.try_read(&mut buffer) {
            Ok(0) => {
                give_buffer(buffer);
                Ok(Load::End)
            }
            Ok(length) => {
                flow.took(copied_path, 0);
                Ok(Load::Cargo(Cargo::Buffer(buffer, 0), length))
            }
            Err(error) => {
                give_buffer(buffer);
                nothing_or(error)
            }
        }
    }

    /// Moves up to `left` bytes on; how many went.
    fn unload(&mut self, destination: &TcpStream, left: usize) -> io::Result<usize> {
        match self {
            Cargo::Pipe(pipe) => {
                destination.try_io(Interest::WRITABLE, || splice_out(pipe, destination, left))
            }
            Cargo::Buffer(buffer, sent) => {
                let moved = destination.try_write(&buffer[*sent..*sent + left])?;
                *sent += moved;
                Ok(moved)
            }
            Cargo::Last(buffer, sent) => {
                let moved = destination.try_write_last(&buffer[*sent..*sent + left])?;
                *sent += moved;
                Ok(moved)
            }
        }
    }

    /// Empty again.
    fn give_back(self) {
        match self {
            Cargo::Pipe(pipe) => give_pipe(pipe),
            Cargo::Buffer(buffer, _) | Cargo::Last(buffer, _) => give_buffer(buffer),
        }
    }
}

/// What is short is copied in any case: the path of a direction is the one that more bytes would take.
fn foretell(flow: &Flow, (spliced, copied): (Path, Path)) {
    match flow.may_splice().then(take_pipe).flatten() {
        Some(pipe) => {
            flow.took(spliced, pipe.granted_bytes);
            give_pipe(pipe);
        }
        None => flow.took(copied, 0),
    }
}

fn nothing_or(error: io::Error) -> io::Result<Load> {
    if error.kind() == io::ErrorKind::WouldBlock { Ok(Load::Nothing) } else { Err(error) }
}

/// Never SPLICE_F_MORE: it holds a small message back for 200 ms.
pub fn splice_in(source: &TcpStream, pipe: &Pipe) -> io::Result<usize> {
    retry_interrupted(|| splice(source, None, &pipe.write, None, PIPE_BYTES, SpliceFlags::NONBLOCK))
}

/// One plain read; the bytes are in `copied` then.
fn copy_in(source: &TcpStream, most_bytes: usize, copied: &mut Option<Vec<u8>>) -> io::Result<usize> {
    let mut buffer = take_buffer();
    match rustix::net::recv(source, &mut buffer[..most_bytes], rustix::net::RecvFlags::DONTWAIT) {
        Ok((length, _)) if length > 0 => {
            *copied = Some(buffer);
            Ok(length)
        }
        answer => {
            give_buffer(buffer);
            Ok(answer?.0)
        }
    }
}

fn splice_out(pipe: &Pipe, destination: &TcpStream, left: usize) -> io::Result<usize> {
    retry_interrupted(|| {
        splice(&pipe.read, None, destination, None, left.min(PIPE_BYTES), SpliceFlags::NONBLOCK)
    })
}

fn retry_interrupted(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            answer => return Ok(answer?),
        }
    }
}

pub fn is_unsupported(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::NOSYS].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::gather::tests::{gathering_connection, is_readable};
    use crate::socket::tests::{pair, runtime};

    #[test]
    fn a_connection_that_gathers_has_the_kernel_wait_for_the_wan_and_not_for_the_lan() {
        runtime().block_on(async {
            let ((lan, mut application), (wan, mut far)) = (pair(), pair());
            let (legs, connection) = (Legs { lan, wan }, gathering_connection(&far, 2));
            let mut carrying = pin!(relay(&legs, &Clear, &connection));
            assert!(carrying.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            application.write_all(b"a message").unwrap();
            far.write_all(b"a message").unwrap();
            assert!(is_readable(&legs.lan, 60));
            assert!(!is_readable(&legs.wan, 0));
        });
    }
}
