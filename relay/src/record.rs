//! The records of an open TLS 1.3 session, made and opened where they lie (RFC 8446, 5.2): nothing is copied, and a session
//! without bytes is two keys and two counters. The handshake and the preamble are rustls' (`tls`), and so are new keys.

use std::io::IoSliceMut;
use std::ops::Range;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, InvalidMessage, PeerMisbehaved};

use crate::pipe::BUFFER_BYTES;
use crate::tls::{HEADER_BYTES, Keys, LONGEST_RECORD_BYTES, Session};

pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
pub const KEY_UPDATE: u8 = 24;
/// RFC 8446, 4.6.3: a handshake message of one byte, which does not ask the peer for a new key of its own.
pub const NEW_KEY: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
const TAG_BYTES: usize = 16;
/// RFC 8446, 5.4: content, or content with padding.
const LONGEST_CONTENT_BYTES: usize = 1 << 14;
/// Header, content type and tag: what a record has on the wire besides its content.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;
const SLOT_BYTES: usize = LONGEST_CONTENT_BYTES + OVERHEAD_BYTES;
const NEW_KEY_BYTES: usize = NEW_KEY.len() + OVERHEAD_BYTES;
pub const ALERT_BYTES: usize = 2 + OVERHEAD_BYTES;
/// Records that one buffer has room for, behind one that changes the key.
const SLOTS: usize = (BUFFER_BYTES - NEW_KEY_BYTES) / SLOT_BYTES;
/// Of each key's records so many are kept for what is no data.
pub const KEPT_RECORDS: u64 = 8;
/// New keys of the peer without a byte of data in between.
const MOST_NEW_KEYS_IN_A_ROW: u8 = 32;

/// What the peer has done wrong, and the alert that tells it; none where the peer has sent one, which ends the session as well.
#[derive(Debug)]
pub struct Fault {
    pub error: Error,
    pub alert: Option<AlertDescription>,
}

fn fault(alert: AlertDescription, error: impl Into<Error>) -> Fault {
    Fault { error: error.into(), alert: Some(alert) }
}

fn unexpected(what: &str) -> Fault {
    fault(AlertDescription::UnexpectedMessage, Error::General(what.into()))
}

/// What was in a record.
#[derive(Debug, Eq, PartialEq)]
pub enum Content {
    /// So many bytes, which begin where the ciphertext began.
    Data(usize),
    /// Its direction has ended in order: whatever follows is ignored (RFC 8446, 6.1).
    CloseNotify,
    /// Something that was for this session alone.
    Nothing,
}

/// One direction's key, and the number of its next record.
struct Key {
    /// Zeroed when it is dropped.
    secrets: ConnectionTrafficSecrets,
    /// The key as the cipher wants it, ten times as large; made when it is needed.
    aead: Option<Box<LessSafeKey>>,
    next_record: u64,
}

impl Key {
    fn new(secrets: ConnectionTrafficSecrets, next_record: u64) -> Key {
        Key { secrets, aead: None, next_record }
    }

    /// The cipher with the nonce of the next record: its number, exclusive-or the IV (RFC 8446, 5.3). No number comes twice,
    /// and none wraps.
    fn next(&mut self) -> Result<(&LessSafeKey, Nonce), Error> {
        let (algorithm, key, iv) = match &self.secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that this relay does not know".into())),
        };
        let number = self.next_record;
        self.next_record =
            number.checked_add(1).ok_or_else(|| Error::General("no record number is left".into()))?;
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - 8..].copy_from_slice(&number.to_be_bytes());
        for (byte, secret) in nonce.iter_mut().zip(iv.as_ref()) {
            *byte ^= secret;
        }
        if self.aead.is_none() {
            // Of a shorter key the library keeps more bytes than there are.
            let unbound = UnboundKey::new(algorithm, &key.as_ref()[..algorithm.key_len()]);
            let unbound = unbound.map_err(|_| Error::General("a key that is none".into()))?;
            self.aead = Some(Box::new(LessSafeKey::new(unbound)));
        }
        let aead = self.aead.as_ref().ok_or(Error::EncryptError)?;
        Ok((aead, Nonce::assume_unique_for_key(nonce)))
    }

    fn seal(&mut self, content_type: u8, record: &mut [u8]) -> Result<(), Error> {
        let failed = || Error::EncryptError;
        let (header, body) = record.split_first_chunk_mut::<HEADER_BYTES>().ok_or_else(failed)?;
        let [high, low] = u16::try_from(body.len()).map_err(|_| failed())?.to_be_bytes();
        *header = [DATA, 3, 3, high, low];
        let (inner, tag) = body.split_last_chunk_mut::<TAG_BYTES>().ok_or_else(failed)?;
        *inner.last_mut().ok_or_else(failed)? = content_type;
        let (aead, nonce) = self.next()?;
        let sealed = aead.seal_in_place_separate_tag(nonce, Aad::from(*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| failed())?.as_ref());
        Ok(())
    }

    /// Opens all of `record`; its content type and the length of its content, which begins behind the header.
    fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), Fault> {
        let undecipherable = || fault(AlertDescription::BadRecordMac, Error::DecryptError);
        let (header, body) = record.split_first_chunk_mut::<HEADER_BYTES>().ok_or_else(undecipherable)?;
        let (aead, nonce) = self.next().map_err(|error| fault(AlertDescription::InternalError, error))?;
        let inner = aead.open_in_place(nonce, Aad::from(*header), body).map_err(|_| undecipherable())?;
        // RFC 8446, 5.4: padding counts.
        if inner.len() > LONGEST_CONTENT_BYTES + 1 {
            return Err(fault(AlertDescription::RecordOverflow, Error::PeerSentOversizedRecord));
        }
        match inner.iter().rposition(|byte| *byte != 0) {
            Some(length) => Ok((inner[length], length)),
            None => Err(unexpected("a record without a content type")),
        }
    }
}

/// How long the record at the front of `bytes` is, with its header; None while that is not there. After the handshake every
/// record looks like data (RFC 8446, 5.2), and nothing else is believed.
pub fn length_of_first(bytes: &[u8]) -> Result<Option<usize>, Fault> {
    let Some([content_type, version @ .., high, low]) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    if *content_type != DATA || *version != [3, 3] {
        return Err(fault(AlertDescription::UnexpectedMessage, InvalidMessage::InvalidContentType));
    }
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if length > LONGEST_RECORD_BYTES {
        return Err(fault(AlertDescription::RecordOverflow, Error::PeerSentOversizedRecord));
    }
    Ok(Some(HEADER_BYTES + length))
}

/// The type and the body of the handshake message at the front, and what follows it; None if it is not whole.
fn first_message(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let ([kind, high, middle, low], rest) = bytes.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes([0, *high, *middle, *low]);
    let (body, behind) = rest.split_at_checked(length as usize)?;
    Some((*kind, body, behind))
}

/// Both directions of an open session. In boxes, because small pieces of memory fit between the large ones that sockets and
/// tasks have at rounded addresses.
pub struct Records {
    sending: Box<Key>,
    receiving: Box<Key>,
    keys: Box<Keys>,
    is_client: bool,
    /// The peer wants a new key from us.
    key_wanted: bool,
    new_keys_in_a_row: u8,
}

impl Records {
    /// Goes on where `session` stands: with its next record, either way.
    pub fn of(session: Session) -> Result<Records, Error> {
        let is_client = session.is_client();
        let (secrets, keys) = session.into_keys()?;
        Ok(Records {
            sending: Box::new(Key::new(secrets.tx.1, secrets.tx.0)),
            receiving: Box::new(Key::new(secrets.rx.1, secrets.rx.0)),
            keys: Box::new(keys),
            is_client,
            key_wanted: false,
            new_keys_in_a_row: 0,
        })
    }

    /// Holds what it can make again from the keys.
    pub fn is_awake(&self) -> bool {
        self.sending.aead.is_some() || self.receiving.aead.is_some()
    }

    /// Gives that up, until it is needed.
    pub fn rest(&mut self) {
        self.sending.aead = None;
        self.receiving.aead = None;
    }

    /// Opens a whole record.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Content, Fault> {
        let (content_type, length) = self.receiving.open(record)?;
        let content = &record[HEADER_BYTES..HEADER_BYTES + length];
        match (content_type, content) {
            (DATA, _) => {
                if length > 0 {
                    self.new_keys_in_a_row = 0;
                }
                Ok(Content::Data(length))
            }
            (ALERT, [_, description]) => match AlertDescription::from(*description) {
                AlertDescription::CloseNotify => Ok(Content::CloseNotify),
                // RFC 8446, 6.2: whatever its level says.
                description => Err(Fault { error: Error::AlertReceived(description), alert: None }),
            },
            (ALERT, _) => Err(fault(AlertDescription::DecodeError, InvalidMessage::TrailingData("alert"))),
            (HANDSHAKE, messages) => self.obey(messages).map(|()| Content::Nothing),
            _ => Err(fault(AlertDescription::UnexpectedMessage, InvalidMessage::InvalidContentType)),
        }
    }

    /// Whole messages, at least one (RFC 8446, 5.1). A relay sends none but KeyUpdate: its ticket is before its answer.
    fn obey(&mut self, mut messages: &[u8]) -> Result<(), Fault> {
        while let Some((kind, message, behind)) = first_message(messages) {
            match (kind, message) {
                (NEW_SESSION_TICKET, _) if self.is_client => {}
                (KEY_UPDATE, [0 | 1]) if behind.is_empty() => self.take_new_key(message == [1])?,
                // RFC 8446, 4.6.3.
                (KEY_UPDATE, [_]) if behind.is_empty() => {
                    return Err(fault(AlertDescription::IllegalParameter, InvalidMessage::InvalidKeyUpdate));
                }
                (KEY_UPDATE, [_]) => return Err(unexpected("something under a key that is over")),
                (KEY_UPDATE, _) => {
                    return Err(fault(AlertDescription::DecodeError, InvalidMessage::InvalidKeyUpdate));
                }
                _ => return Err(unexpected("an unexpected handshake message")),
            }
            if behind.is_empty() {
                return Ok(());
            }
            messages = behind;
        }
        Err(unexpected("a handshake message in fragments"))
    }

    fn take_new_key(&mut self, wants_one: bool) -> Result<(), Fault> {
        self.new_keys_in_a_row += 1;
        if self.new_keys_in_a_row > MOST_NEW_KEYS_IN_A_ROW {
            return Err(fault(AlertDescription::UnexpectedMessage, PeerMisbehaved::TooManyKeyUpdateRequests));
        }
        let next = self.keys.next_to_receive();
        *self.receiving = Key::new(next.map_err(|error| fault(AlertDescription::InternalError, error))?, 0);
        self.key_wanted |= wants_one;
        Ok(())
    }

    /// Makes records of the `length` bytes that `slots` has been filled with, and says where in `buffer` they stand. Before
    /// them goes a new key, if the peer has asked for one (RFC 8446, 4.6.3) or the present one might make too many.
    pub fn seal_data(&mut self, buffer: &mut [u8], length: usize) -> Result<Range<usize>, Error> {
        let (front, slots) = buffer.split_at_mut(NEW_KEY_BYTES);
        let records = length.div_ceil(LONGEST_CONTENT_BYTES);
        let made = self.sending.next_record + records as u64;
        let mut from = front.len();
        if self.key_wanted || made > self.keys.records_per_key().saturating_sub(KEPT_RECORDS) {
            front[HEADER_BYTES..][..NEW_KEY.len()].copy_from_slice(&NEW_KEY);
            self.seal(HANDSHAKE, front)?;
            *self.sending = Key::new(self.keys.next_to_send()?, 0);
            self.key_wanted = false;
            from = 0;
        }
        let end = length + records * OVERHEAD_BYTES;
        for record in slots[..end].chunks_mut(SLOT_BYTES) {
            self.seal(DATA, record)?;
        }
        Ok(from..NEW_KEY_BYTES + end)
    }

    /// Makes one record of all of `record`, whose content stands in it already: behind room for the header, and before room for
    /// content type and tag.
    pub fn seal(&mut self, content_type: u8, record: &mut [u8]) -> Result<(), Error> {
        self.sending.seal(content_type, record)
    }

    /// An alert as a record. The level is that of RFC 8446, 6.
    pub fn seal_alert(&mut self, alert: AlertDescription) -> Result<[u8; ALERT_BYTES], Error> {
        let mut record = [0; ALERT_BYTES];
        let level = if alert == AlertDescription::CloseNotify { 1 } else { 2 };
        record[HEADER_BYTES..][..2].copy_from_slice(&[level, alert.into()]);
        self.seal(ALERT, &mut record)?;
        Ok(record)
    }
}

/// Where in a buffer of the pool the bytes go that `seal_data` makes records of.
pub fn slots(buffer: &mut [u8]) -> [IoSliceMut<'_>; SLOTS] {
    let mut slots = buffer[NEW_KEY_BYTES..].chunks_exact_mut(SLOT_BYTES);
    std::array::from_fn(|_| {
        let slot = slots.next().unwrap_or_default();
        IoSliceMut::new(slot.get_mut(HEADER_BYTES..HEADER_BYTES + LONGEST_CONTENT_BYTES).unwrap_or_default())
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::key::Ciphers;
    use crate::tls;

    /// Both ends of a session: the side that has connected, and the other.
    pub fn pair(ciphers: Ciphers) -> (Records, Records) {
        let (client, server) = tls::tests::pair(ciphers);
        (Records::of(client).unwrap(), Records::of(server).unwrap())
    }

    fn both() -> (Records, Records) {
        pair(Ciphers::default())
    }

    /// One record, whatever is in it.
    fn record(from: &mut Records, content_type: u8, content: &[u8]) -> Vec<u8> {
        let mut record = vec![0; content.len() + OVERHEAD_BYTES];
        record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
        from.seal(content_type, &mut record).unwrap();
        record
    }

    fn alert(opened: Result<Content, Fault>) -> AlertDescription {
        opened.unwrap_err().alert.unwrap()
    }

    /// What a relay makes of a message of the LAN.
    fn sealed(from: &mut Records, message: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut rest = message;
        for slot in &mut slots(&mut buffer) {
            let (now, later) = rest.split_at(rest.len().min(slot.len()));
            slot[..now.len()].copy_from_slice(now);
            rest = later;
        }
        assert!(rest.is_empty());
        let made = from.seal_data(&mut buffer, message.len()).unwrap();
        buffer[made].to_vec()
    }

    /// The data in all of `bytes`, and how many records it took.
    fn opened(to: &mut Records, mut bytes: Vec<u8>) -> (Vec<u8>, usize) {
        let (mut data, mut records, mut from) = (Vec::new(), 0, 0);
        while let Some(length) = length_of_first(&bytes[from..]).unwrap() {
            let record = &mut bytes[from..from + length];
            match to.open(record).unwrap() {
                Content::Data(length) => data.extend_from_slice(&record[HEADER_BYTES..][..length]),
                Content::Nothing => {}
                Content::CloseNotify => panic!("no end was said"),
            }
            (records, from) = (records + 1, from + length);
        }
        assert_eq!(from, bytes.len());
        (data, records)
    }

    fn noise(length: usize) -> Vec<u8> {
        (0..length).map(|place| (place * 31 + place / 251) as u8).collect()
    }

    #[test]
    fn what_is_sealed_is_opened_with_each_cipher_and_whatever_its_length() {
        for chacha_first in [false, true] {
            let (mut client, mut server) = pair(Ciphers { chacha_first, ..Ciphers::default() });
            for length in [1, 16383, 16384, 16385, SLOTS * LONGEST_CONTENT_BYTES] {
                let message = noise(length);
                let records = length.div_ceil(LONGEST_CONTENT_BYTES);
                assert_eq!(opened(&mut server, sealed(&mut client, &message)), (message.clone(), records));
                assert_eq!(opened(&mut client, sealed(&mut server, &message)), (message, records));
                client.rest();
            }
        }
    }

    #[test]
    fn a_record_may_be_padded_and_may_be_empty() {
        let (mut client, mut server) = both();
        let mut padded = b"word".to_vec();
        padded.push(DATA);
        padded.resize(LONGEST_CONTENT_BYTES, 0);
        let mut padded = record(&mut client, 0, &padded);
        assert_eq!(server.open(&mut padded).unwrap(), Content::Data(4));
        assert_eq!(&padded[HEADER_BYTES..][..4], b"word");
        assert_eq!(server.open(&mut record(&mut client, DATA, b"")).unwrap(), Content::Data(0));
    }

    #[test]
    fn a_header_that_no_relay_makes_is_refused_before_its_length_is_believed() {
        let refused = |header: [u8; HEADER_BYTES]| length_of_first(&header).unwrap_err().alert.unwrap();
        for header in [[22, 3, 3, 0, 40], [21, 3, 3, 0, 2], [20, 3, 3, 0, 1], [23, 3, 1, 0, 40], [0; 5]] {
            assert_eq!(refused(header), AlertDescription::UnexpectedMessage, "{header:?}");
        }
        let length = |bytes: u16| [DATA, 3, 3, bytes.to_be_bytes()[0], bytes.to_be_bytes()[1]];
        assert_eq!(refused(length(16384 + 257)), AlertDescription::RecordOverflow);
        assert_eq!(length_of_first(&length(16384 + 256)).unwrap(), Some(16384 + 256 + 5));
        assert_eq!(length_of_first(&length(40)[..4]).unwrap(), None);
    }

    #[test]
    fn a_record_that_is_changed_shortened_repeated_or_left_out_is_not_the_peers() {
        for length in 0..OVERHEAD_BYTES - HEADER_BYTES {
            let mut short = vec![0; HEADER_BYTES + length];
            short[..4].copy_from_slice(&[DATA, 3, 3, 0]);
            short[4] = length as u8;
            assert_eq!(alert(both().1.open(&mut short)), AlertDescription::BadRecordMac);
        }
        for place in 0..OVERHEAD_BYTES + 4 {
            let (mut client, mut server) = both();
            let mut changed = record(&mut client, DATA, b"word");
            changed[place] ^= 1;
            assert_eq!(alert(server.open(&mut changed)), AlertDescription::BadRecordMac, "byte {place}");
        }
        let (mut client, mut server) = both();
        let first = record(&mut client, DATA, b"word");
        assert_eq!(server.open(&mut first.clone()).unwrap(), Content::Data(4));
        assert_eq!(alert(server.open(&mut first.clone())), AlertDescription::BadRecordMac);
        let (mut client, mut server) = both();
        record(&mut client, DATA, b"lost");
        assert_eq!(
            alert(server.open(&mut record(&mut client, DATA, b"word"))),
            AlertDescription::BadRecordMac
        );
    }

    #[test]
    fn what_a_peer_may_not_put_into_a_record_ends_the_session_with_the_alert_for_it() {
        let cases: [(u8, &[u8], AlertDescription); 16] = [
            (0, &[], AlertDescription::UnexpectedMessage),
            (0, &[0; 99], AlertDescription::UnexpectedMessage),
            (DATA, &[1; LONGEST_CONTENT_BYTES + 1], AlertDescription::RecordOverflow),
            (0, &[1; LONGEST_CONTENT_BYTES + 1], AlertDescription::RecordOverflow),
            (20, &[1], AlertDescription::UnexpectedMessage),
            (24, &[1], AlertDescription::UnexpectedMessage),
            (ALERT, &[], AlertDescription::DecodeError),
            (ALERT, &[1, 0, 1, 0], AlertDescription::DecodeError),
            (HANDSHAKE, &[], AlertDescription::UnexpectedMessage),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0], AlertDescription::UnexpectedMessage),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0, 1], AlertDescription::UnexpectedMessage),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 2], AlertDescription::IllegalParameter),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0, 0], AlertDescription::DecodeError),
            (
                HANDSHAKE,
                &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE, 0, 0, 1, 0],
                AlertDescription::UnexpectedMessage,
            ),
            (HANDSHAKE, &[1, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
            (HANDSHAKE, &[NEW_SESSION_TICKET, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
        ];
        for (content_type, content, expected) in cases {
            let (mut client, mut server) = both();
            let mut record = record(&mut client, content_type, content);
            assert_eq!(alert(server.open(&mut record)), expected, "{content_type}: {:?}", content.first());
        }
    }

    #[test]
    fn an_end_is_one_at_any_level_and_any_other_alert_is_an_abort_that_is_not_answered() {
        for level in [1, 2] {
            let (mut client, mut server) = both();
            let mut end = record(&mut client, ALERT, &[level, 0]);
            assert_eq!(server.open(&mut end).unwrap(), Content::CloseNotify);
            let mut abort = record(&mut client, ALERT, &[level, 20]);
            let fault = server.open(&mut abort).unwrap_err();
            assert_eq!(fault.error, Error::AlertReceived(AlertDescription::BadRecordMac));
            assert!(fault.alert.is_none());
        }
        let (mut client, mut server) = both();
        let mut end = client.seal_alert(AlertDescription::CloseNotify).unwrap();
        assert_eq!(server.open(&mut end).unwrap(), Content::CloseNotify);
    }

    #[test]
    fn tickets_of_a_server_are_ignored() {
        let (mut client, mut server) = both();
        let ticket = [NEW_SESSION_TICKET, 0, 0, 3, 1, 2, 3];
        let mut tickets = record(&mut server, HANDSHAKE, &[ticket, ticket].concat());
        assert_eq!(client.open(&mut tickets).unwrap(), Content::Nothing);
        assert_eq!(opened(&mut client, sealed(&mut server, b"word")).0, b"word");
    }

    #[test]
    fn a_peer_that_asks_for_a_new_key_gets_one_before_the_next_data_and_only_then() {
        let (mut client, mut server) = both();
        for _ in 0..3 {
            let mut question = record(&mut client, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 1]);
            *client.sending = Key::new(client.keys.next_to_send().unwrap(), 0);
            assert_eq!(server.open(&mut question).unwrap(), Content::Nothing);
        }
        assert_eq!(opened(&mut server, sealed(&mut client, b"word")), (b"word".to_vec(), 1));
        assert_eq!(opened(&mut client, sealed(&mut server, b"answer")), (b"answer".to_vec(), 2));
        assert_eq!(opened(&mut client, sealed(&mut server, b"more")), (b"more".to_vec(), 1));
        assert!(!client.key_wanted, "an answer asks for nothing");
    }

    #[test]
    fn a_peer_that_only_ever_changes_its_key_is_cut_off() {
        let (mut client, mut server) = both();
        for number in 0..=MOST_NEW_KEYS_IN_A_ROW {
            let mut new_key = record(&mut client, HANDSHAKE, &NEW_KEY);
            *client.sending = Key::new(client.keys.next_to_send().unwrap(), 0);
            let answer = server.open(&mut new_key);
            if number < MOST_NEW_KEYS_IN_A_ROW {
                assert_eq!(answer.unwrap(), Content::Nothing);
            } else {
                assert_eq!(alert(answer), AlertDescription::UnexpectedMessage);
            }
        }
    }

    #[test]
    fn a_key_makes_no_more_records_than_it_may() {
        let (mut client, mut server) = pair(Ciphers { records_per_key: 1024, ..Ciphers::default() });
        let message = noise(SLOTS * LONGEST_CONTENT_BYTES);
        let mut changes = 0;
        for _ in 0..300 {
            let before = client.sending.next_record;
            let (data, records) = opened(&mut server, sealed(&mut client, &message));
            assert!(data == message);
            changes += records - SLOTS;
            assert!(before + KEPT_RECORDS <= 1024 && client.sending.next_record + KEPT_RECORDS <= 1024);
        }
        assert!(changes >= 300 * SLOTS / 1024, "{changes}");
    }

    #[test]
    fn no_number_of_a_record_comes_twice() {
        let (mut client, _) = both();
        client.sending.next_record = u64::MAX;
        assert!(client.seal_alert(AlertDescription::CloseNotify).is_err());
    }
}
