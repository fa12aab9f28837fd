//! Names for the error numbers that a relay meets: a log line with "ECONNREFUSED" needs no look-up.

use std::io;

use rustix::io::Errno;

macro_rules! names {
    ($($short:ident $long:literal),* $(,)?) => {
        /// The C name; a number for what no relay has met yet.
        pub fn name(number: i32) -> String {
            $(if number == Errno::$short.raw_os_error() { return $long.into(); })*
            format!("errno {number}")
        }
    };
}

names! {
    CONNREFUSED "ECONNREFUSED", CONNRESET "ECONNRESET", CONNABORTED "ECONNABORTED", TIMEDOUT "ETIMEDOUT", PIPE "EPIPE",
    HOSTUNREACH "EHOSTUNREACH", NETUNREACH "ENETUNREACH", NETDOWN "ENETDOWN", HOSTDOWN "EHOSTDOWN",
    ADDRINUSE "EADDRINUSE", ADDRNOTAVAIL "EADDRNOTAVAIL", AFNOSUPPORT "EAFNOSUPPORT", NOTCONN "ENOTCONN",
    ACCESS "EACCES", PERM "EPERM", MFILE "EMFILE", NFILE "ENFILE", NOBUFS "ENOBUFS", NOMEM "ENOMEM", INVAL "EINVAL",
    NOSYS "ENOSYS", NOSPC "ENOSPC", NOENT "ENOENT", EXIST "EEXIST", IO "EIO", PROTO "EPROTO", NOTSOCK "ENOTSOCK",
    NAMETOOLONG "ENAMETOOLONG", ROFS "EROFS", DQUOT "EDQUOT", NOTDIR "ENOTDIR", OPNOTSUPP "EOPNOTSUPP",
    BUSY "EBUSY", BADMSG "EBADMSG", KEYEXPIRED "EKEYEXPIRED",
}

/// The number behind an I/O error; 0 when it did not come from the kernel.
pub fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::TimedOut => Errno::TIMEDOUT.raw_os_error(),
        io::ErrorKind::UnexpectedEof => Errno::CONNRESET.raw_os_error(),
        _ => 0,
    })
}

/// The C name of an I/O error, or its text.
pub fn of(error: &io::Error) -> String {
    match number(error) {
        0 => error.to_string(),
        known => name(known),
    }
}

/// The process or the system is out of something that may come back; ENOSPC is of epoll (`fs.epoll.max_user_watches`).
pub fn is_shortage(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::NOSPC]
        .iter()
        .any(|e| number(error) == e.raw_os_error())
}
