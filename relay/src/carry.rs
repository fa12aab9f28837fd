//! A connection whose two sides are there: bytes flow until the applications end it, something breaks, or somebody cuts it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;

use crate::config::Role;
use crate::connection::{Connection, Leg, LegError, Legs};
use crate::ktls::{self, Handed, KernelSession};
use crate::listen::Active;
use crate::relay::{Books, Closing, Reason};
use crate::splice::{self, Clear};
use crate::tls::Session;
use crate::tls_copy::{self, Pump};

/// Reasons to cut a connection whose peer has stopped answering while its window was closed: an error as from the kernel.
pub const LAN_SILENT: &str = "lan-silent";
pub const WAN_SILENT: &str = "wan-silent";

/// A connection whose two sides are there.
pub struct Begun {
    pub books: Books,
    /// Held for as long as the connection is open.
    pub active: Active,
    pub onward: SocketAddr,
    pub legs: Legs,
    /// In mode `tls` only.
    pub session: Option<Box<Session>>,
    /// How many bytes from the LAN are on the WAN already, and counted, or how the LAN has failed.
    pub first_word: io::Result<usize>,
}

/// The task of a connection. Its parts are in boxes, so that an idle connection keeps memory neither for how it began nor for
/// a way to travel that is not its own. By hand, because a task takes memory in steps of 128 bytes, and this needs but one.
pub enum Task<B> {
    Beginning(Pin<Box<B>>),
    Carrying(Carrying),
}

type Carrying = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Carries a connection to its end and accounts for it.
pub fn serve<B: Future<Output = Option<Begun>>>(begin: B) -> Task<B> {
    Task::Beginning(Box::pin(begin))
}

impl<B: Future<Output = Option<Begun>>> Future for Task<B> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let begun = match &mut *self {
                Task::Beginning(begin) => ready!(begin.as_mut().poll(context)),
                Task::Carrying(carrying) => return carrying.as_mut().poll(context),
            };
            let Some(carrying) = begun.and_then(carry) else { return Poll::Ready(()) };
            *self = Task::Carrying(carrying);
        }
    }
}

/// Lets the bytes flow. None: this connection is over already, and accounted for.
fn carry(begun: Begun) -> Option<Carrying> {
    let Begun { books, active, onward, legs, session, first_word } = begun;
    let legs = Arc::new(legs);
    let Books(relay, connection) = &books;
    connection.connected(onward, legs.clone());
    relay.streaming(connection);
    let first_word = match first_word {
        Ok(first_word) => first_word,
        Err(error) => {
            close(&books, legs, Err(LegError::new(Leg::Lan, &error)));
            return None;
        }
    };
    let Some(session) = session else { return Some(to_the_end(books, active, legs, Clear)) };
    let pump = match ktls::hand_over(&relay.kernel_tls, *session, &legs.wan, first_word) {
        Ok(Handed::ToKernel(tls)) => {
            connection.explain_path(tls.reason());
            return Some(to_the_end(books, active, legs, tls));
        }
        Ok(Handed::Back(session, reason)) => {
            connection.explain_path(reason);
            Pump::of(*session).map_err(|error| LegError::tls(&error))
        }
        Err(error) => Err(error),
    };
    match pump {
        Ok(pump) => Some(to_the_end(books, active, legs, pump)),
        Err(error) => {
            close(&books, legs, Err(error));
            None
        }
    }
}

/// How the bytes of a connection travel, both ways.
trait Way: Send + 'static {
    fn relay<'a>(
        &'a mut self,
        legs: &'a Legs,
        connection: &'a Connection,
    ) -> impl Future<Output = Result<(), LegError>> + Send + 'a;
}

impl Way for Clear {
    fn relay<'a>(
        &'a mut self,
        legs: &'a Legs,
        connection: &'a Connection,
    ) -> impl Future<Output = Result<(), LegError>> + Send + 'a {
        splice::relay(legs, self, connection)
    }
}

impl Way for Box<KernelSession> {
    fn relay<'a>(
        &'a mut self,
        legs: &'a Legs,
        connection: &'a Connection,
    ) -> impl Future<Output = Result<(), LegError>> + Send + 'a {
        splice::relay(legs, &**self, connection)
    }
}

impl Way for Pump {
    fn relay<'a>(
        &'a mut self,
        legs: &'a Legs,
        connection: &'a Connection,
    ) -> impl Future<Output = Result<(), LegError>> + Send + 'a {
        tls_copy::relay(self, legs, connection)
    }
}

/// From the first byte to the last, and the books.
fn to_the_end<W: Way>(books: Books, active: Active, legs: Arc<Legs>, mut way: W) -> Carrying {
    Box::pin(async move {
        let ended = tokio::select! {
            ended = way.relay(&legs, &books.1) => ended.map(|()| "closed"),
            reason = books.1.is_cut() => match reason {
                LAN_SILENT => Err(LegError::new(Leg::Lan, &Errno::TIMEDOUT.into())),
                WAN_SILENT => Err(LegError::new(Leg::Wan, &Errno::TIMEDOUT.into())),
                reason => Ok(reason),
            },
        };
        close(&books, legs, ended);
        drop(active);
    })
}

/// The sockets first: whoever reads of the end finds them closed.
fn close(Books(relay, connection): &Books, legs: Arc<Legs>, ended: Result<&'static str, LegError>) {
    let closing = match ended {
        Ok(reason) => Closing { reason, abort: None, text: None },
        Err(error) => broken(relay.config.role, &error),
    };
    connection.disconnected();
    drop(legs);
    relay.close(connection, Some(closing));
}

/// Who is behind an error: the application on this LAN, or whatever is behind the WAN. A WAN that has gone silent is the
/// network's or the relay's doing; a reset there is what the far relay passes on from its application.
fn broken(role: Role, error: &LegError) -> Closing {
    let producer = (role == Role::Prod) == (error.leg == Leg::Lan);
    let silent = error.leg == Leg::Wan && (error.errno == Errno::TIMEDOUT.raw_os_error() || error.errno == 0);
    let (reason, abort) = if silent {
        ("peer", Reason::RelayLost)
    } else if producer {
        ("aborted-by-producer", Reason::AbortedByProducer)
    } else {
        ("aborted-by-consumer", Reason::AbortedByConsumer)
    };
    Closing { reason, abort: Some(abort), text: Some(error.text.clone()) }
}
