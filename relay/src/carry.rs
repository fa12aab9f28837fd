//! A connection whose two sides are there: bytes flow until the applications end it, something breaks, or somebody cuts it.

use std::net::SocketAddr;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::net::TcpStream;

use crate::config::Role;
use crate::connection::{Connection, Leg, LegError, Legs};
use crate::ktls::{self, Handed};
use crate::relay::{Closing, Reason, Relay};
use crate::tls::Session;
use crate::{splice, tls_copy};

/// Reasons to cut a connection whose peer has stopped answering while its window was closed: an error as from the kernel.
pub const LAN_SILENT: &str = "lan-silent";
pub const WAN_SILENT: &str = "wan-silent";

/// Carries `connection` to its end and accounts for it. `session` is there in mode `tls` only.
pub async fn carry(
    relay: &Relay,
    connection: &Connection,
    onward: SocketAddr,
    lan: TcpStream,
    wan: TcpStream,
    session: Option<Session>,
) {
    relay.congestion.settle(&lan);
    relay.congestion.settle(&wan);
    let (lan, wan) = (Arc::new(lan), Arc::new(wan));
    connection.connected(onward, Legs { lan: lan.clone(), wan: wan.clone() });
    relay.streaming(connection);
    let closing = tokio::select! {
        ended = transfer(relay, connection, &lan, &wan, session) => match ended {
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
    drop((lan, wan));
    relay.close(connection, Some(closing));
}

/// TLS is boxed: a connection without it keeps no memory for it.
async fn transfer(
    relay: &Relay,
    connection: &Connection,
    lan: &TcpStream,
    wan: &TcpStream,
    session: Option<Session>,
) -> Result<(), LegError> {
    match session {
        Some(session) => match ktls::hand_over(&relay.kernel_tls, session, wan)? {
            Handed::ToKernel(tls) => {
                connection.explain_path(tls.reason());
                Box::pin(splice::relay(lan, wan, &*tls, connection)).await
            }
            Handed::Back(session, reason) => {
                connection.explain_path(reason);
                Box::pin(tls_copy::relay(*session, lan, wan, connection)).await
            }
        },
        None => splice::relay(lan, wan, &splice::Clear, connection).await,
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
