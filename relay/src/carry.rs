//! A connection whose two sides are there: bytes flow until the applications end it, something breaks, or somebody cuts it.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::net::TcpStream;

use crate::config::Role;
use crate::connection::{Connection, Leg, LegError, Legs};
use crate::ktls::{self, Handed};
use crate::listen::Active;
use crate::relay::{Books, Closing, Reason, Relay};
use crate::tls::Session;
use crate::{splice, tls_copy};

/// Reasons to cut a connection whose peer has stopped answering while its window was closed: an error as from the kernel.
pub const LAN_SILENT: &str = "lan-silent";
pub const WAN_SILENT: &str = "wan-silent";

/// A connection whose two sides are there.
pub struct Begun {
    pub books: Books,
    /// Held for as long as the connection is open.
    pub active: Active,
    pub onward: SocketAddr,
    pub lan: Arc<TcpStream>,
    pub wan: Arc<TcpStream>,
    /// In mode `tls` only.
    pub session: Option<Box<Session>>,
}

/// Carries a connection to its end and accounts for it. What `begin` needs is given back before: an idle connection keeps no
/// memory for how it began. So it comes in a box: as an argument it would be a part of this future to its end.
pub async fn serve(begin: Pin<Box<impl Future<Output = Option<Box<Begun>>>>>) {
    let begun = begin.await;
    if let Some(begun) = begun {
        carry(begun).await;
    }
}

async fn carry(mut begun: Box<Begun>) {
    let session = begun.session.take();
    let Begun { books, onward, lan, wan, .. } = &*begun;
    let (relay, connection) = (&*books.0, &*books.1);
    connection.connected(*onward, Legs { lan: lan.clone(), wan: wan.clone() });
    relay.streaming(connection);
    let closing = tokio::select! {
        ended = transfer(relay, connection, lan, wan, session) => match ended {
            Ok(()) => Closing { reason: "closed", abort: None, text: None },
            Err(error) => broken(relay.config.role, &error),
        },
        reason = connection.is_cut() => match reason {
            LAN_SILENT => broken(relay.config.role, &LegError::new(Leg::Lan, &Errno::TIMEDOUT.into())),
            WAN_SILENT => broken(relay.config.role, &LegError::new(Leg::Wan, &Errno::TIMEDOUT.into())),
            reason => Closing { reason, abort: None, text: None },
        },
    };
    connection.disconnected();
    let Begun { books, active: _active, lan, wan, .. } = *begun;
    drop((lan, wan));
    books.0.close(&books.1, Some(closing));
}

/// Each in a box: a connection keeps memory for its own way alone.
async fn transfer(
    relay: &Relay,
    connection: &Connection,
    lan: &TcpStream,
    wan: &TcpStream,
    session: Option<Box<Session>>,
) -> Result<(), LegError> {
    match session {
        Some(session) => match ktls::hand_over(&relay.kernel_tls, *session, wan)? {
            Handed::ToKernel(tls) => {
                connection.explain_path(tls.reason());
                Box::pin(splice::relay(lan, wan, &*tls, connection)).await
            }
            Handed::Back(session, reason) => {
                connection.explain_path(reason);
                Box::pin(tls_copy::relay(*session, lan, wan, connection)).await
            }
        },
        None => Box::pin(splice::relay(lan, wan, &splice::Clear, connection)).await,
    }
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
