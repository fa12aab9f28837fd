//! Which congestion control a data socket has: the system's own on a long path, and on a short one none that paces.
//!
//! Gateways have BBR because of the wide area, and it sends by a timer: one for each 64 KiB, unless the queueing discipline is
//! fq on a real interface. Across a site, where nothing is won by it, that timer costs more than all the rest of a relay does
//! (docs/performance.md has the figures).

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use s2ds_sys::TcpInfo;

use crate::socket::TcpStream;

/// Round trips below this stay within a site.
const SHORT_PATH: Duration = Duration::from_millis(1);
/// Sends when it is acknowledged, is there on every Linux, and is free for every user (RFC 9438).
const UNPACED: &str = "cubic";

/// The system's own congestion control if it is one that paces; else there is nothing to do.
pub struct Congestion(Option<String>);

impl Congestion {
    /// Looks at what a new socket has. Nothing is changed where that does not pace, or where the other one is not to be had.
    pub fn of_this_system() -> Congestion {
        let own = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).and_then(
            |socket| {
                let own = sockopt::tcp_congestion(&socket)?;
                sockopt::set_tcp_congestion(&socket, UNPACED)?;
                Ok(own)
            },
        );
        Congestion(own.ok().filter(|own| own.starts_with("bbr")))
    }

    /// Prepares a socket before it listens or connects; what it accepts inherits it. It must come first: a socket that has
    /// ever been BBR's keeps its timer.
    pub fn begin(&self, socket: impl AsFd) {
        if self.0.is_some() {
            // It has worked on a like socket; where it does not, the system's own is no error.
            let _ = sockopt::set_tcp_congestion(socket, UNPACED);
        }
    }

    /// Gives a connected socket the system's own, unless its path has shown to be short.
    pub fn settle(&self, stream: &TcpStream, info: &TcpInfo) {
        let Some(own) = &self.0 else { return };
        // 0: nothing is known.
        if info.min_rtt_us == 0 || Duration::from_micros(info.min_rtt_us.into()) >= SHORT_PATH {
            let _ = sockopt::set_tcp_congestion(stream, own);
        }
    }
}
