//! A TLS 1.3 session over a socket that somebody else reads and writes: rustls' unbuffered interface, because the modes need
//! to know exactly which bytes have left the kernel.

use std::sync::{Arc, Mutex};
use std::{fmt, io};

use rustls::client::UnbufferedClientConnection;
use rustls::crypto::cipher::{AeadKey, Iv, NONCE_LEN};
use rustls::crypto::tls13::{OkmBlock, expand};
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{
    ClientConfig, ConnectionTrafficSecrets, ExtractedSecrets, HandshakeKind, KeyLog, ServerConfig,
    SupportedCipherSuite, Tls13CipherSuite,
};

use crate::connection::lock;
use crate::key::PublicKey;
use crate::socket::{TcpStream, have_spoken, read, write_all};

pub const HEADER_BYTES: usize = 5;
/// RFC 8446, 5.2: the longest record on the wire, without its header.
pub const LONGEST_RECORD_BYTES: usize = 16384 + 256;
/// Content type, padding, tag and header, generously, for each 16 KiB record.
const RECORD_OVERHEAD_BYTES: usize = 64;
pub const ALERT_BYTES: usize = 2;
/// Content type and tag, of any cipher.
const LEAST_OVERHEAD_BYTES: usize = 1 + 16;
/// Until PROD has the Finished of CONS it says nothing but its own flight, so all that there is belongs to it.
pub const WHOLE_FLIGHT_BYTES: usize = 4096;
/// Of keys, before the first byte of payload. Nobody has a reason for even one.
const MOST_CHANGES: usize = 32;
/// The labels of a key log that the secrets of the first keys have.
const CLIENT_SECRET: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER_SECRET: &str = "SERVER_TRAFFIC_SECRET_0";

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// Where a session stands once everything that was received has been processed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    Handshaking,
    Open,
}

pub struct Session {
    side: Side,
    standing: Standing,
    /// The front of a record whose end has not come yet; before it what the library has of a handshake message, as it left it.
    incoming: Vec<u8>,
    seen: usize,
    pub outgoing: Outbox,
    /// Plaintext from the peer, not yet taken.
    pub plain: Vec<u8>,
    /// The peer's close_notify was received: it ended its direction in order.
    pub peer_closed: bool,
    secrets: Arc<Secrets>,
}

/// What is left of a session whose keys are somebody else's: it makes the next ones. The library's own would take as much
/// memory again as everything else of an idle connection.
pub struct Keys {
    suite: &'static Tls13CipherSuite,
    sending: OkmBlock,
    receiving: OkmBlock,
}

impl Keys {
    /// How many records one key may make (RFC 8446, 5.5).
    pub fn records_per_key(&self) -> u64 {
        self.suite.common.confidentiality_limit
    }

    /// The key to send with after a KeyUpdate has been sent; its records count from 0.
    pub fn next_to_send(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        next_key(self.suite, &mut self.sending)
    }

    /// The key to receive with after a KeyUpdate has been received; its records count from 0.
    pub fn next_to_receive(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        next_key(self.suite, &mut self.receiving)
    }
}

/// Puts the next traffic secret in place of one, and makes its key (RFC 8446, 7.2 and 7.3).
fn next_key(
    suite: &Tls13CipherSuite,
    secret: &mut OkmBlock,
) -> Result<ConnectionTrafficSecrets, rustls::Error> {
    *secret = next_secret(suite, secret);
    let expander = suite.hkdf_provider.expander_for_okm(secret);
    // Of a shorter key the first bytes are the same.
    let key: AeadKey = expand_label(b"key", suite.aead_alg.key_len(), |info| expand(&*expander, info));
    let iv = iv_of(suite, secret);
    suite.aead_alg.extract_keys(key, iv).map_err(|error| rustls::Error::General(error.to_string()))
}

fn next_secret(suite: &Tls13CipherSuite, secret: &OkmBlock) -> OkmBlock {
    let expander = suite.hkdf_provider.expander_for_okm(secret);
    expand_label(b"traffic upd", expander.hash_len(), |info| expander.expand_block(info))
}

fn iv_of(suite: &Tls13CipherSuite, secret: &OkmBlock) -> Iv {
    let expander = suite.hkdf_provider.expander_for_okm(secret);
    expand_label(b"iv", NONCE_LEN, |info| expand(&*expander, info))
}

/// The secret that a key in use comes from: the first one, or one after it if the peer has changed keys before its turn. With an
/// older one the next key would be made twice, and count its records from 0 again.
fn secret_of(
    suite: &Tls13CipherSuite,
    mut secret: OkmBlock,
    in_use: &ConnectionTrafficSecrets,
) -> Result<OkmBlock, rustls::Error> {
    let (ConnectionTrafficSecrets::Aes128Gcm { iv, .. }
    | ConnectionTrafficSecrets::Aes256Gcm { iv, .. }
    | ConnectionTrafficSecrets::Chacha20Poly1305 { iv, .. }) = in_use
    else {
        return Err(rustls::Error::General("a cipher without a key to change".into()));
    };
    for _ in 0..=MOST_CHANGES {
        if iv_of(suite, &secret).as_ref() == iv.as_ref() {
            return Ok(secret);
        }
        secret = next_secret(suite, &secret);
    }
    Err(rustls::Error::General("the peer has changed its key too often before its turn".into()))
}

/// HKDF-Expand-Label without a context (RFC 8446, 7.1).
fn expand_label<T>(label: &[u8], length: usize, expand: impl FnOnce(&[&[u8]]) -> T) -> T {
    const PREFIX: &[u8] = b"tls13 ";
    expand(&[&(length as u16).to_be_bytes(), &[(PREFIX.len() + label.len()) as u8], PREFIX, label, &[0]])
}

/// The secrets that the first keys of a session come from, each direction's, as the library says them to whoever logs keys.
#[derive(Default)]
struct Secrets(Mutex<(Option<OkmBlock>, Option<OkmBlock>)>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

impl KeyLog for Secrets {
    fn will_log(&self, label: &str) -> bool {
        [CLIENT_SECRET, SERVER_SECRET].contains(&label)
    }

    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut secrets = lock(&self.0);
        let of_its_side = if label == CLIENT_SECRET { &mut secrets.0 } else { &mut secrets.1 };
        *of_its_side = Some(OkmBlock::new(secret));
    }
}

/// Ciphertext for the peer, not yet written. Keeps its memory, so that it is zeroed once and not for each record.
#[derive(Default)]
pub struct Outbox {
    buffer: Vec<u8>,
    sent: usize,
    filled: usize,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.sent == self.filled
    }

    pub fn pending(&self) -> &[u8] {
        &self.buffer[self.sent..self.filled]
    }

    /// The first `count` pending bytes have been written.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.is_empty() {
            self.sent = 0;
            self.filled = 0;
        }
    }

    /// Behind the end of our direction of a session: what the peer is to read without one.
    pub fn add_clear(&mut self, bytes: &[u8]) {
        self.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    fn room(&mut self, count: usize) -> &mut [u8] {
        if self.buffer.len() < self.filled + count {
            self.buffer.resize(self.filled + count, 0);
        }
        &mut self.buffer[self.filled..]
    }
}

/// Why a handshake ended without a session.
#[derive(Debug)]
pub enum HandshakeError {
    /// The peer went away or is silent: perhaps it is no relay, or not ready.
    Io(io::Error),
    /// It spoke, and was refused or refused us.
    Tls(rustls::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        HandshakeError::Io(error)
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        HandshakeError::Tls(error)
    }
}

impl Session {
    pub fn client(mut config: Arc<ClientConfig>) -> Result<Session, rustls::Error> {
        // The name is not used for anything: the pin is.
        let name =
            ServerName::try_from("s2ds.invalid").map_err(|_| rustls::Error::General("server name".into()))?;
        let secrets = Arc::new(Secrets::default());
        Arc::make_mut(&mut config).key_log = secrets.clone();
        Ok(Session::new(Side::Client(Box::new(UnbufferedClientConnection::new(config, name)?)), secrets))
    }

    pub fn server(mut config: Arc<ServerConfig>) -> Result<Session, rustls::Error> {
        let secrets = Arc::new(Secrets::default());
        Arc::make_mut(&mut config).key_log = secrets.clone();
        Ok(Session::new(Side::Server(Box::new(UnbufferedServerConnection::new(config)?)), secrets))
    }

    fn new(side: Side, secrets: Arc<Secrets>) -> Session {
        Session {
            side,
            standing: Standing::Handshaking,
            incoming: Vec::new(),
            seen: 0,
            outgoing: Outbox::default(),
            plain: Vec::new(),
            peer_closed: false,
            secrets,
        }
    }

    /// The key that the peer has proven.
    pub fn peer_key(&self) -> Option<PublicKey> {
        let certificates = match &self.side {
            Side::Client(connection) => connection.peer_certificates(),
            Side::Server(connection) => connection.peer_certificates(),
        };
        PublicKey::from_spki(certificates?.first()?)
    }

    /// It stands on a session before it: nobody has checked the key of the peer now.
    pub fn is_resumed(&self) -> bool {
        let kind = match &self.side {
            Side::Client(connection) => connection.handshake_kind(),
            Side::Server(connection) => connection.handshake_kind(),
        };
        kind == Some(HandshakeKind::Resumed)
    }

    pub fn suite(&self) -> Option<SupportedCipherSuite> {
        match &self.side {
            Side::Client(connection) => connection.negotiated_cipher_suite(),
            Side::Server(connection) => connection.negotiated_cipher_suite(),
        }
    }

    /// Everything that has left the kernel was taken from here, and everything for the peer was written.
    pub fn is_empty(&self) -> bool {
        self.standing == Standing::Open
            && !self.peer_closed
            && self.incoming.is_empty()
            && self.plain.is_empty()
            && self.outgoing.is_empty()
    }

    pub fn is_client(&self) -> bool {
        matches!(self.side, Side::Client(_))
    }

    /// The keys with the numbers of the next records, for somebody else to go on with.
    pub fn into_keys(self) -> Result<(ExtractedSecrets, Keys), rustls::Error> {
        if !self.incoming.is_empty() {
            return Err(rustls::Error::General("the peer has spoken before its turn".into()));
        }
        let incomplete = rustls::Error::HandshakeNotComplete;
        let suite = self.suite().and_then(|suite| suite.tls13()).ok_or(incomplete.clone())?;
        let (Some(client), Some(server)) = std::mem::take(&mut *lock(&self.secrets.0)) else {
            return Err(incomplete);
        };
        let (sending, receiving, secrets) = match self.side {
            Side::Client(connection) => (client, server, connection.dangerous_into_kernel_connection()?.0),
            Side::Server(connection) => (server, client, connection.dangerous_into_kernel_connection()?.0),
        };
        let sending = secret_of(suite, sending, &secrets.tx.1)?;
        let receiving = secret_of(suite, receiving, &secrets.rx.1)?;

        Ok((secrets, Keys { suite, sending, receiving }))
    }

    /// Processes every whole record in `incoming` and says how many bytes at its front are done with. Plaintext goes to
    /// `plain`, answers to `outgoing`. After an error `outgoing` holds the alert to send.
    pub fn receive(&mut self, incoming: &mut [u8]) -> Result<usize, rustls::Error> {
        let mut done = 0;
        loop {
            let rest = &mut incoming[done..];
            let (discard, seen) = match &mut self.side {
                Side::Client(connection) => {
                    handle(connection.process_tls_records(rest), &mut self.outgoing, &mut self.plain)
                }
                Side::Server(connection) => {
                    handle(connection.process_tls_records(rest), &mut self.outgoing, &mut self.plain)
                }
            };
            done += discard;
            match seen {
                Seen::Progress => {}
                Seen::PeerClosed => self.peer_closed = true,
                Seen::Blocked(standing) => {
                    self.standing = standing;
                    if standing == Standing::Open
                        && !self.peer_closed
                        && starts_with_record(&incoming[done..])
                    {
                        // Part of a handshake message: rustls would want to find it there at each later call.
                        return Err(rustls::Error::General("a handshake message in fragments".into()));
                    }
                    return Ok(done);
                }
                Seen::Failed(error) => {
                    self.collect_alert(&mut incoming[done..]);
                    return Err(error);
                }
            }
        }
    }

    /// Encrypts all of `plaintext` into `outgoing`. Call it only with an empty inbox (`receive` has taken every whole record).
    pub fn send(&mut self, plaintext: &[u8]) -> Result<(), rustls::Error> {
        self.receive(&mut [])?;
        let records = plaintext.len() / 16384 + 2;
        self.write(plaintext.len() + records * RECORD_OVERHEAD_BYTES, |traffic, out| match traffic {
            Traffic::Client(mut traffic) => traffic.encrypt(plaintext, out),
            Traffic::Server(mut traffic) => traffic.encrypt(plaintext, out),
        })
    }

    /// Ends our direction in order.
    pub fn send_close_notify(&mut self) -> Result<(), rustls::Error> {
        self.receive(&mut [])?;
        self.write(RECORD_OVERHEAD_BYTES, |traffic, out| match traffic {
            Traffic::Client(mut traffic) => traffic.queue_close_notify(out),
            Traffic::Server(mut traffic) => traffic.queue_close_notify(out),
        })
    }

    fn write(
        &mut self,
        room_bytes: usize,
        fill: impl FnOnce(Traffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), rustls::Error> {
        let traffic = match &mut self.side {
            Side::Client(connection) => match connection.process_tls_records(&mut []).state {
                Ok(ConnectionState::WriteTraffic(traffic)) => Some(Traffic::Client(traffic)),
                _ => None,
            },
            Side::Server(connection) => match connection.process_tls_records(&mut []).state {
                Ok(ConnectionState::WriteTraffic(traffic)) => Some(Traffic::Server(traffic)),
                _ => None,
            },
        };
        let Some(traffic) = traffic else {
            return Err(rustls::Error::General("the session cannot carry data now".into()));
        };
        let written = fill(traffic, self.outgoing.room(room_bytes));
        self.outgoing.filled += written.map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(())
    }

    /// After an error the library queues the alert that tells the peer why. It still knows of messages in `rest`, and wants to
    /// find them there; but once it has given the alert away it must not be asked again: it would read on, and fail again.
    fn collect_alert(&mut self, rest: &mut [u8]) {
        let before = self.outgoing.filled;
        for _ in 0..4 {
            let seen = match &mut self.side {
                Side::Client(connection) => {
                    handle(connection.process_tls_records(rest), &mut self.outgoing, &mut self.plain).1
                }
                Side::Server(connection) => {
                    handle(connection.process_tls_records(rest), &mut self.outgoing, &mut self.plain).1
                }
            };
            if !matches!(seen, Seen::Progress) || self.outgoing.filled > before {
                return;
            }
        }
    }

    /// Shakes hands. Behind each record of the handshake there are `behind_bytes` more for certain that belong to the session,
    /// so that one call may read the whole of a flight and still no byte that is none of the session's leaves the kernel.
    /// Our last flight stays in `outgoing`, to be sent together with the first message.
    pub async fn handshake(&mut self, stream: &TcpStream, behind_bytes: usize) -> Result<(), HandshakeError> {
        let mut is_first = true;
        loop {
            if let Err(error) = self.take_incoming() {
                // So that the peer learns why; it may be gone already.
                let _ = stream.try_write(self.outgoing.pending());
                return Err(error.into());
            }
            if self.standing == Standing::Open {
                return Ok(());
            }
            self.flush(stream).await?;
            if is_first && self.is_client() {
                have_spoken(stream);
            }
            is_first = false;
            self.read(stream, HEADER_BYTES, behind_bytes).await?;
        }
    }

    /// Receives exactly `buffer.len()` bytes of plaintext, and no record behind the last of them but the `behind_bytes` that are
    /// there for certain and belong to the session.
    pub async fn read_exact(
        &mut self,
        stream: &TcpStream,
        buffer: &mut [u8],
        behind_bytes: usize,
    ) -> Result<(), HandshakeError> {
        self.take_incoming()?;
        while self.plain.len() < buffer.len() {
            if self.peer_closed {
                return Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            // In however many records they come: shorter than in one they cannot be.
            self.read(stream, least_record_bytes(buffer.len() - self.plain.len()), behind_bytes).await?;
            self.take_incoming()?;
        }
        let rest = self.plain.split_off(buffer.len());
        buffer.copy_from_slice(&self.plain);
        self.plain = rest;
        Ok(())
    }

    /// Receives until the peer's close_notify and not one byte more: what follows it in the kernel is clear text.
    pub async fn read_close_notify(&mut self, stream: &TcpStream) -> Result<(), HandshakeError> {
        self.take_incoming()?;
        while !self.peer_closed {
            self.read(stream, least_record_bytes(ALERT_BYTES), 0).await?;
            self.take_incoming()?;
        }
        if self.plain.is_empty() {
            Ok(())
        } else {
            Err(HandshakeError::Tls(rustls::Error::General(
                "data between the preamble and close_notify".into(),
            )))
        }
    }

    /// Processes the whole records that have come; the front of the next one stays.
    fn take_incoming(&mut self) -> Result<(), rustls::Error> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let whole = self.seen + whole_records(&incoming[self.seen..])?;
        let done = self.receive(&mut incoming[..whole])?;
        incoming.drain(..done);
        self.seen = whole - done;
        self.incoming = incoming;
        Ok(())
    }

    /// Receives what there is of the next record, which has at least `least_bytes` with its header, and of so many behind it.
    async fn read(
        &mut self,
        stream: &TcpStream,
        least_bytes: usize,
        behind_bytes: usize,
    ) -> Result<(), HandshakeError> {
        let had = self.incoming.len();
        let record = length_of_first(&self.incoming[self.seen..])?.unwrap_or(least_bytes);
        self.incoming.resize(self.seen + record + behind_bytes, 0);
        let read = read(stream, &mut self.incoming[had..]).await;
        self.incoming.truncate(had + read.as_ref().unwrap_or(&0));
        read?;
        Ok(())
    }

    /// Writes what is in `outgoing`.
    pub async fn flush(&mut self, stream: &TcpStream) -> io::Result<()> {
        write_all(stream, self.outgoing.pending()).await?;
        self.outgoing.sent(self.outgoing.pending().len());
        Ok(())
    }
}

fn starts_with_record(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER_BYTES
        && bytes.len() - HEADER_BYTES >= usize::from(u16::from_be_bytes([bytes[3], bytes[4]]))
}

enum Traffic<'c> {
    Client(rustls::unbuffered::WriteTraffic<'c, rustls::client::ClientConnectionData>),
    Server(rustls::unbuffered::WriteTraffic<'c, rustls::server::ServerConnectionData>),
}

enum Seen {
    Progress,
    PeerClosed,
    Blocked(Standing),
    Failed(rustls::Error),
}

/// One step of the library's state machine; how many bytes to drop from the front of what was given, and what it came to.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Outbox,
    plain: &mut Vec<u8>,
) -> (usize, Seen) {
    let mut discard = status.discard;
    let seen = match status.state {
        Err(error) => Seen::Failed(error),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            // It says how long it is: room for a longest record would be zeroed for each that is short.
            let mut written = data.encode(&mut []);
            if let Err(EncodeError::InsufficientSize(more)) = &written {
                written = data.encode(outgoing.room(more.required_size));
            }
            match written {
                Ok(length) => {
                    outgoing.filled += length;
                    Seen::Progress
                }
                Err(error) => Seen::Failed(rustls::Error::General(error.to_string())),
            }
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It stands in `outgoing`, which is always written in order.
            data.done();
            Seen::Progress
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut seen = Seen::Progress;
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                    Err(error) => {
                        seen = Seen::Failed(error);
                        break;
                    }
                }
            }
            seen
        }
        Ok(ConnectionState::PeerClosed) => Seen::PeerClosed,
        Ok(ConnectionState::BlockedHandshake) => Seen::Blocked(Standing::Handshaking),
        Ok(ConnectionState::WriteTraffic(_) | ConnectionState::Closed) => Seen::Blocked(Standing::Open),
        Ok(_) => Seen::Failed(rustls::Error::General("unexpected state of the session".into())),
    };
    (discard, seen)
}

/// What a record with so much plaintext has at least, with its header.
pub const fn least_record_bytes(plaintext_bytes: usize) -> usize {
    HEADER_BYTES + plaintext_bytes + LEAST_OVERHEAD_BYTES
}

/// How many bytes at the front are whole records.
fn whole_records(bytes: &[u8]) -> Result<usize, rustls::Error> {
    let mut end = 0;
    while let Some(length) = length_of_first(&bytes[end..])? {
        if bytes.len() - end < length {
            break;
        }
        end += length;
    }
    Ok(end)
}

/// How long the record at the front is, with its header; None while that is not there. Anything but a TLS record ends here,
/// before its "length" is believed.
fn length_of_first(bytes: &[u8]) -> Result<Option<usize>, rustls::Error> {
    let Some([content_type, major, _, high, low]) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    let is_record = (20..=24).contains(content_type) && *major == 3;
    if !is_record || length == 0 || length > LONGEST_RECORD_BYTES {
        return Err(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType));
    }
    Ok(Some(HEADER_BYTES + length))
}

#[cfg(test)]
pub mod tests {
    use std::sync::RwLock;

    use super::*;
    use crate::key::{Ciphers, Identity};

    /// Both ends of an open session: the side that has connected, and the other.
    pub fn pair(ciphers: Ciphers) -> (Session, Session) {
        let (prod, cons) = (Identity::generate(ciphers).unwrap(), Identity::generate(ciphers).unwrap());
        let admitted = Arc::new(RwLock::new(vec![cons.public]));
        let mut server = Session::server(prod.server(admitted).unwrap()).unwrap();
        let mut client = Session::client(cons.client(prod.public).unwrap()).unwrap();
        assert_eq!(client.receive(&mut []).unwrap(), 0);
        while !(client.is_empty() && server.is_empty()) {
            pass_on(&mut client, &mut server);
            pass_on(&mut server, &mut client);
        }
        (client, server)
    }

    fn pass_on(from: &mut Session, to: &mut Session) {
        let mut said = from.outgoing.pending().to_vec();
        from.outgoing.sent(said.len());
        assert_eq!(to.receive(&mut said).unwrap(), said.len());
    }

    fn bytes(secrets: ConnectionTrafficSecrets) -> (Vec<u8>, Vec<u8>) {
        match secrets {
            ConnectionTrafficSecrets::Aes256Gcm { key, iv }
            | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (key.as_ref().to_vec(), iv.as_ref().to_vec())
            }
            _ => panic!("another cipher"),
        }
    }

    /// The client changes its key, and asks the server to.
    fn change_keys(client: &mut Session, server: &mut Session) {
        let Side::Client(connection) = &mut client.side else { panic!("no client") };
        match connection.process_tls_records(&mut []).state.unwrap() {
            ConnectionState::WriteTraffic(traffic) => traffic.refresh_traffic_keys().unwrap(),
            _ => panic!("no open session"),
        }
        client.send(b"it is no flood of changes").unwrap();
        pass_on(client, server);
        server.send(b"so it sends its own change").unwrap();
        pass_on(server, client);
    }

    #[test]
    fn the_next_keys_are_those_that_the_library_makes() {
        for (chacha_first, changes) in [(false, 0), (true, 0), (false, 1), (true, 3)] {
            let (mut client, mut server) = pair(Ciphers { chacha_first, ..Ciphers::default() });
            for _ in 0..changes {
                change_keys(&mut client, &mut server);
            }
            let mut ours = client.into_keys().unwrap().1;
            let Side::Server(server) = server.side else { panic!("no server") };
            let mut theirs = server.dangerous_into_kernel_connection().unwrap().1;
            for _ in 0..3 {
                assert_eq!(bytes(ours.next_to_send().unwrap()), bytes(theirs.update_rx_secret().unwrap().1));
                assert_eq!(
                    bytes(ours.next_to_receive().unwrap()),
                    bytes(theirs.update_tx_secret().unwrap().1)
                );
            }
        }
    }

    #[test]
    fn who_changes_keys_all_the_time_before_its_turn_is_left() {
        let (mut client, mut server) = pair(Ciphers::default());
        for _ in 0..=MOST_CHANGES {
            change_keys(&mut client, &mut server);
        }
        assert!(server.into_keys().is_err());
    }
}
