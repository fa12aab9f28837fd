//! Mode `tls` with the records made and opened by the kernel (kTLS), so that bytes are spliced as they are in clear text. What
//! is no data (alerts, new keys) passes through here, and new keys are made here.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, TlsGetRecordType, recvmsg, setsockopt};
use rustix::io::Errno;
use rustls::{CipherSuite, ConnectionTrafficSecrets};
use s2ds_sys::{send_tls_record, tcp_info, tls_next_record, unacked_bytes};
use tokio::io::Interest;

use crate::connection::{Flow, Leg, LegError, Path, lock};
use crate::errno;
use crate::key::Ciphers;
use crate::pipe::{Pipe, give_buffer, give_pipe, take_buffer, take_pipe};
use crate::record::{ALERT, HANDSHAKE, KEPT_RECORDS, KEY_UPDATE, NEW_KEY, OVERHEAD_BYTES};
use crate::socket::TcpStream;
use crate::splice::{Cargo, Load, Wire, is_unsupported, splice_in};
use crate::timer;
use crate::tls::{Keys, Session};

const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);
const CLOSE_NOTIFY: &[u8] = &[1, 0];
/// A call gives at most a full pipe of 256 pages, and each page ends at most one record.
const MOST_RECORDS_A_CALL: u64 = 260;
/// A record of 16 KiB comes out of the kernel in so many pages, wherever it began in the first one, and then some. Linux 6.1
/// loses what finds no room in the pipe, so room is what is looked at before.
const PAGES_A_RECORD: usize = 8;
/// At most so many records are taken before they are passed on.
const MOST_RECORDS_A_LOAD: usize = 16;
/// How often to look whether the kernel has sent what a close would take along.
const SETTLING: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// What the TLS of this kernel can do.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTls {
    /// AES-256-GCM with new keys on a running connection (Linux 6.14): without them, it could carry 256 GiB and no more.
    pub new_keys: bool,
    /// ChaCha20-Poly1305, which needs none.
    pub chacha: bool,
}

/// Why this kernel has no TLS.
#[derive(Debug)]
pub struct Unable {
    error: io::Error,
    /// Each connection says so, and all of them share it.
    text: Arc<str>,
}

impl Unable {
    fn new(call: &str, error: io::Error) -> Unable {
        let text = format!("no kernel TLS ({call}: {})", errno::of(&error));
        Unable { error, text: text.into() }
    }

    /// The C name of the kernel's error.
    pub fn errno(&self) -> String {
        errno::of(&self.error)
    }
}

impl fmt::Display for Unable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl KernelTls {
    /// Tries it, on a connection of this process with itself.
    pub fn try_here() -> Result<KernelTls, Unable> {
        let (near, far) = loopback().map_err(|error| Unable::new("loopback", error))?;
        for end in [&near, &far] {
            enable(end).map_err(|error| Unable::new("TCP_ULP", error))?;
        }
        let aes = TlsCryptoInfo::Aes256Gcm(aes_256_gcm(&[1; 32], &[1; 12], 0));
        let chacha = TlsCryptoInfo::Chacha20Poly1305(chacha20_poly1305(&[1; 32], &[1; 12], 0));
        let takes = |socket, key| {
            setsockopt(socket, TcpTlsTx, key).is_ok()
                && setsockopt(socket, TcpTlsRx, key).is_ok()
                && tls_next_record(socket).is_ok()
        };
        Ok(KernelTls { new_keys: takes(&near, &aes) && takes(&near, &aes), chacha: takes(&far, &chacha) })
    }
}

/// Two ends of one TCP connection.
fn loopback() -> io::Result<(std::net::TcpStream, std::net::TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = std::net::TcpStream::connect_timeout(&listener.local_addr()?, LOOPBACK_TIMEOUT)?;
    // What is accepted first could be somebody else's: it would only be a less good test.
    Ok((near, listener.accept()?.0))
}

/// Which cipher a relay wants first.
pub fn ciphers(kernel: &Result<KernelTls, Unable>, records_per_key: u64) -> Ciphers {
    let (new_keys, chacha) =
        kernel.as_ref().map_or((false, false), |kernel| (kernel.new_keys, kernel.chacha));
    Ciphers { chacha_first: chacha && !new_keys, records_per_key, ..Ciphers::default() }
}

/// Who carries a session on.
pub enum Handed {
    ToKernel(Box<KernelSession>),
    /// The session stays as it was, for this reason.
    Back(Box<Session>, Arc<str>),
}

/// Gives an open session to the kernel, if that can carry it. The handshake and the preamble have taken whole records out of
/// the kernel and not one byte more, so the next one, either way, is the kernel's. `first_word`: so many bytes of payload are
/// sent already.
pub fn hand_over(
    kernel: &Result<KernelTls, Unable>,
    session: Session,
    wan: &TcpStream,
    first_word: usize,
) -> Result<Handed, LegError> {
    let suite = session.suite();
    let refusal = match (kernel, suite.map(|suite| suite.suite())) {
        (Err(unable), _) => Some(unable.text.clone()),
        (Ok(kernel), Some(CipherSuite::TLS13_AES_256_GCM_SHA384)) => {
            (!kernel.new_keys).then(|| "the TLS of this kernel takes no new keys, which AES-GCM needs".into())
        }
        (Ok(kernel), Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256)) => {
            (!kernel.chacha).then(|| "the TLS of this kernel has no ChaCha20-Poly1305".into())
        }
        (Ok(_), other) => Some(format!("the kernel is given no {other:?}").into()),
    };
    if let Some(reason) = refusal {
        return Ok(Handed::Back(Box::new(session), reason));
    }
    if !session.is_empty() {
        return Ok(Handed::Back(Box::new(session), "the peer had begun before the hand-over".into()));
    }
    // Without keys this changes nothing, so up to here there is a way back.
    if let Err(error) = enable(wan) {
        return Ok(Handed::Back(Box::new(session), Unable::new("TCP_ULP", error).text));
    }
    let at_wan = |error: io::Error| LegError::new(Leg::Wan, &error);
    let (secrets, keys) = session.into_keys().map_err(|error| LegError::tls(&error))?;
    let written_bytes = written_for_certain(wan).map_err(at_wan)?;
    let (first_record, sending) = secrets.tx;
    let (next_received, receiving) = secrets.rx;
    let cipher = name(&sending);
    give_key(wan, TcpTlsTx, &sending, first_record).map_err(at_wan)?;
    give_key(wan, TcpTlsRx, &receiving, next_received).map_err(at_wan)?;
    Ok(Handed::ToKernel(Box::new(KernelSession {
        cipher,
        limit: keys.records_per_key(),
        keys: Mutex::new(keys),
        sent: Mutex::new(Sent {
            before_bytes: written_bytes - first_word as u64,
            first_record,
            ..Sent::default()
        }),
        late_error: Mutex::new(None),
    })))
}

/// A session that the kernel carries, on the socket that it was handed over with.
pub struct KernelSession {
    cipher: &'static str,
    /// How many records one key may make.
    limit: u64,
    keys: Mutex<Keys>,
    sent: Mutex<Sent>,
    /// Came while something was loaded already.
    late_error: Mutex<Option<io::Error>>,
}

/// The books of what was sent.
#[derive(Default)]
struct Sent {
    /// On the wire, before the hand-over, but for the bytes of payload themselves, which the connection counts.
    before_bytes: u64,
    /// The bytes of the records that are no data.
    other_bytes: u64,
    /// The records of former keys, and the number that the present one began with.
    former_records: u64,
    first_record: u64,
    /// So many records may certainly be made before somebody has to look.
    certain_records: u64,
    /// The peer wants a new key from us.
    key_wanted: bool,
}

impl KernelSession {
    /// Why the path of a connection is this one.
    pub fn reason(&self) -> Arc<str> {
        format!("{} by the kernel", self.cipher).into()
    }

    /// Sends a record that is no data, whole.
    async fn send_record(&self, wan: &TcpStream, content_type: u8, bytes: &[u8]) -> Result<(), LegError> {
        let at_wan = |error: io::Error| LegError::new(Leg::Wan, &error);
        loop {
            wan.writable().await.map_err(at_wan)?;
            match wan.try_io(Interest::WRITABLE, || send_tls_record(wan, content_type, bytes)) {
                Ok(taken) if taken == bytes.len() => break,
                Ok(_) => return Err(at_wan(io::ErrorKind::WriteZero.into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(at_wan(error)),
            }
        }
        lock(&self.sent).other_bytes += bytes.len() as u64;
        Ok(())
    }

    /// What comes next is not data, or splice cannot take it.
    fn take_record(&self, wan: &TcpStream, flow: &Flow) -> Result<Load, LegError> {
        let mut buffer = take_buffer();
        let received = try_io(wan, || receive(wan, &mut buffer));
        let loaded = match received {
            Ok((Content::Data, length)) => {
                if !flow.has_moved() {
                    flow.forbid_splice();
                }
                flow.took(Path::KtlsCopy, 0);
                buffer.truncate(length);
                return Ok(Load::Cargo(Cargo::Buffer(buffer, 0), length));
            }
            Ok((Content::Alert, _)) if buffer[1] == CLOSE_NOTIFY[1] => Ok(Load::End),
            Ok((Content::Alert, _)) => {
                Err(LegError::silent(Leg::Wan, &format!("the peer sent the TLS alert {}", buffer[1])))
            }
            Ok((Content::Handshake, length)) => self.obey(wan, &buffer[..length]).map(|()| Load::Nothing),
            Ok((Content::End, _)) => Err(cut_off()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Load::Nothing),
            Err(error) => Err(at_wan(&error)),
        };
        give_buffer(buffer);
        loaded
    }

    /// A handshake message after the handshake can only be a KeyUpdate: the ticket of a relay is before its answer, which is read here.
    fn obey(&self, wan: &TcpStream, message: &[u8]) -> Result<(), LegError> {
        let [KEY_UPDATE, 0, 0, 1, wanted @ (0 | 1)] = message else {
            return Err(LegError::silent(Leg::Wan, "an unexpected handshake message"));
        };
        let next = lock(&self.keys).next_to_receive().map_err(|error| LegError::tls(&error))?;
        give_key(wan, TcpTlsRx, &next, 0).map_err(|error| no_new_key(&error))?;
        if *wanted == 1 {
            lock(&self.sent).key_wanted = true;
        }
        Ok(())
    }

    /// Takes more records into a pipe that has one, as long as there is certainly room for a whole one.
    fn top_up(&self, wan: &TcpStream, pipe: &Pipe) -> usize {
        let room = pipe.granted_bytes / rustix::param::page_size() / PAGES_A_RECORD;
        let mut more = 0;
        for _ in 1..room.min(MOST_RECORDS_A_LOAD) {
            // Not by try_io: that there is nothing now is found out again, by the look that may wait for it.
            match splice_in(wan, pipe) {
                Ok(0) => break,
                Ok(length) => more += length,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock && !is_unsupported(&error) {
                        *lock(&self.late_error) = Some(error);
                    }
                    break;
                }
            }
        }
        more
    }
}

/// Reads when there is something, and also when there is nothing but an error to be heard.
fn try_io<T>(wan: &TcpStream, mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match wan.try_io(Interest::READABLE, &mut read) {
        // Not both in one: the library calls nothing for an interest that is made of two.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => wan.try_io(Interest::ERROR, read),
        answer => answer,
    }
}

impl Wire for KernelSession {
    const SPLICED: Path = Path::KtlsSplice;
    const COPIED: Path = Path::KtlsCopy;
    /// A record that is none the kernel may find as it comes in: then the socket has failed, and nothing is to be read.
    const HAS_COME: Interest = Interest::READABLE.add(Interest::ERROR);

    fn load(&self, wan: &TcpStream, flow: &Flow) -> Result<Load, LegError> {
        if let Some(error) = lock(&self.late_error).take() {
            return Err(at_wan(&error));
        }
        let Some(pipe) = flow.may_splice().then(take_pipe).flatten() else {
            return self.take_record(wan, flow);
        };
        match try_io(wan, || splice_in(wan, &pipe)) {
            Ok(0) => {
                give_pipe(pipe);
                Err(cut_off())
            }
            Ok(length) => {
                let length = length + self.top_up(wan, &pipe);
                flow.took(Path::KtlsSplice, pipe.granted_bytes);
                Ok(Load::Cargo(Cargo::Pipe(pipe), length))
            }
            Err(error) => {
                give_pipe(pipe);
                if error.kind() == io::ErrorKind::WouldBlock {
                    Ok(Load::Nothing)
                } else if is_unsupported(&error) {
                    self.take_record(wan, flow)
                } else {
                    Err(at_wan(&error))
                }
            }
        }
    }

    /// The key is to be changed before it has made too many records.
    fn wants_to_prepare(&self, wan: &TcpStream) -> Result<bool, LegError> {
        let mut sent = lock(&self.sent);
        if !sent.key_wanted && sent.certain_records < MOST_RECORDS_A_CALL {
            let made = tls_next_record(wan).map_err(|error| LegError::new(Leg::Wan, &error))?;
            sent.certain_records = self.limit.saturating_sub(made + KEPT_RECORDS);
        }
        if sent.key_wanted || sent.certain_records < MOST_RECORDS_A_CALL {
            return Ok(true);
        }
        sent.certain_records -= MOST_RECORDS_A_CALL;
        Ok(false)
    }

    /// Sends with a new key from here on.
    async fn prepare(&self, wan: &TcpStream) -> Result<(), LegError> {
        self.send_record(wan, HANDSHAKE, &NEW_KEY).await?;
        let records = tls_next_record(wan).map_err(|error| LegError::new(Leg::Wan, &error))?;
        let next = lock(&self.keys).next_to_send().map_err(|error| LegError::tls(&error))?;
        give_key(wan, TcpTlsTx, &next, 0).map_err(|error| no_new_key(&error))?;
        let mut sent = lock(&self.sent);
        sent.former_records += records - sent.first_record;
        sent.first_record = 0;
        sent.certain_records = self.limit.saturating_sub(KEPT_RECORDS);
        sent.key_wanted = false;
        Ok(())
    }

    /// While a pipe has more, Linux 6.1 tells TCP to wait for it with what is less than a segment. If the send buffer is full
    /// then and nothing else is on its way, that would be for ever; the option sends it, each time it is set.
    fn push(&self, wan: &TcpStream) {
        // Of a socket that has failed the next call tells it.
        let _ = rustix::net::sockopt::set_tcp_nodelay(wan, true);
    }

    /// No FIN: the kernel may still have records that TCP has not taken, and they could not follow it.
    async fn end(&self, wan: &TcpStream) -> Result<(), LegError> {
        self.send_record(wan, ALERT, CLOSE_NOTIFY).await
    }

    /// A close takes along what kernel TLS has not given to TCP, and there is no call that says whether there is something. But
    /// what all records come to is known, and what TCP has taken.
    async fn settle(&self, wan: &TcpStream, sent_bytes: u64) -> Result<(), LegError> {
        let at_wan = |error: io::Error| LegError::new(Leg::Wan, &error);
        let expected_bytes = {
            let sent = lock(&self.sent);
            let records = sent.former_records + tls_next_record(wan).map_err(at_wan)? - sent.first_record;
            sent.before_bytes + sent_bytes + sent.other_bytes + OVERHEAD_BYTES as u64 * records
        };
        let (mut pause, longest) = SETTLING;
        while written_at_least(wan).map_err(at_wan)? < expected_bytes {
            tokio::select! {
                _ = wan.ready(Interest::ERROR) => return Err(at_wan(Errno::CONNRESET.into())),
                () = timer::sleep(pause) => pause = (pause * 2).min(longest),
            }
        }
        Ok(())
    }
}

/// What TCP has taken since the connection began. What is acknowledged in between is missed, so it may be too little.
fn written_at_least(socket: &TcpStream) -> io::Result<u64> {
    Ok(tcp_info(socket)?.acked_bytes + unacked_bytes(socket)?)
}

/// The same, exactly. Nobody else writes now.
fn written_for_certain(socket: &TcpStream) -> io::Result<u64> {
    loop {
        let acked_bytes = tcp_info(socket)?.acked_bytes;
        let unacked_bytes = unacked_bytes(socket)?;
        if tcp_info(socket)?.acked_bytes == acked_bytes {
            return Ok(acked_bytes + unacked_bytes);
        }
    }
}

fn cut_off() -> LegError {
    LegError::silent(Leg::Wan, "the WAN ended without close_notify")
}

/// EBADMSG is TLS' word for a record that is not the peer's, and no errno of the network.
fn at_wan(error: &io::Error) -> LegError {
    if error.raw_os_error() == Some(Errno::BADMSG.raw_os_error()) {
        return LegError::silent(Leg::Wan, "EBADMSG: a record that the peer has not made");
    }
    LegError::new(Leg::Wan, error)
}

fn no_new_key(error: &io::Error) -> LegError {
    LegError::silent(Leg::Wan, &format!("the kernel took no new key: {}", errno::of(error)))
}

/// What a record from the kernel is.
enum Content {
    Data,
    Alert,
    Handshake,
    /// No record: TCP has ended.
    End,
}

/// Receives one record that is no data, or some data.
fn receive(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<(Content, usize)> {
    let mut control = nix::cmsg_space!(u8);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let content = match message.cmsgs()?.next() {
        None if message.bytes == 0 => Content::End,
        None => Content::Data,
        Some(ControlMessageOwned::TlsGetRecordType(kind)) => match kind {
            TlsGetRecordType::ApplicationData => Content::Data,
            TlsGetRecordType::Alert if message.bytes == CLOSE_NOTIFY.len() => Content::Alert,
            TlsGetRecordType::Handshake => Content::Handshake,
            _ => return Err(Errno::BADMSG.into()),
        },
        Some(_) => return Err(Errno::BADMSG.into()),
    };
    Ok((content, message.bytes))
}

fn enable(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, TcpUlp::default(), b"tls")?)
}

/// Gives the kernel a key, and the number of the record that comes next.
fn give_key(
    socket: &TcpStream,
    direction: impl nix::sys::socket::SetSockOpt<Val = TlsCryptoInfo>,
    secrets: &ConnectionTrafficSecrets,
    next_record: u64,
) -> io::Result<()> {
    let key = match secrets {
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            TlsCryptoInfo::Aes256Gcm(aes_256_gcm(key.as_ref(), iv.as_ref(), next_record))
        }
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            TlsCryptoInfo::Chacha20Poly1305(chacha20_poly1305(key.as_ref(), iv.as_ref(), next_record))
        }
        _ => return Err(Errno::OPNOTSUPP.into()),
    };
    Ok(setsockopt(socket, direction, &key)?)
}

fn name(secrets: &ConnectionTrafficSecrets) -> &'static str {
    match secrets {
        ConnectionTrafficSecrets::Chacha20Poly1305 { .. } => "ChaCha20-Poly1305",
        _ => "AES-256-GCM",
    }
}

/// `key` has 32 bytes and `iv` 12, as TLS 1.3 has it; of AES-GCM the kernel calls the first four of these the salt.
fn aes_256_gcm(key: &[u8], iv: &[u8], next_record: u64) -> libc::tls12_crypto_info_aes_gcm_256 {
    libc::tls12_crypto_info_aes_gcm_256 {
        info: info(libc::TLS_CIPHER_AES_GCM_256),
        salt: first(iv),
        iv: first(&iv[4..]),
        key: first(key),
        rec_seq: next_record.to_be_bytes(),
    }
}

fn chacha20_poly1305(key: &[u8], iv: &[u8], next_record: u64) -> libc::tls12_crypto_info_chacha20_poly1305 {
    libc::tls12_crypto_info_chacha20_poly1305 {
        info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
        salt: [],
        iv: first(iv),
        key: first(key),
        rec_seq: next_record.to_be_bytes(),
    }
}

fn info(cipher: u16) -> libc::tls_crypto_info {
    libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type: cipher }
}

/// The first N of what has at least N.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    taken.copy_from_slice(&bytes[..N]);
    taken
}
