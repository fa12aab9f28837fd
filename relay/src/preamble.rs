//! The fixed-size messages that open every WAN connection, in all modes. Nothing is negotiated: what does not match exactly
//! is refused.

use crate::config::{Mode, PROTOCOL, RelayId};

/// The first bytes of every request.
pub const MAGIC: &[u8] = b"S2DS";
pub const REQUEST_BYTES: usize = 64;
pub const ANSWER_BYTES: usize = 32;
/// Of what the application has said already, at most so much travels behind a request: with that it is one segment.
pub const FIRST_WORD_BYTES: usize = 1024 - REQUEST_BYTES;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Data,
    /// Goes through to the application; the onward connection is kept for the first data connection.
    ProbeTarget,
    /// Stops at the PROD relay.
    ProbePath,
}

/// What CONS sends first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    pub kind: Kind,
    pub mode: Mode,
    /// The PROD relay that is meant: a port may have been given to another relay since.
    pub relay_id: RelayId,
    pub listener: u16,
    /// A renewal at CONS, passed on; 0 is none.
    pub lease_s: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    Ok,
    Unreachable,
    Busy,
    Denied,
    NotReady,
    Protocol,
}

/// What PROD answers, before any payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    pub verdict: Verdict,
    /// Why the target could not be reached; 0 is none.
    pub errno: u16,
    pub lease_s: u32,
}

impl Answer {
    pub fn of(verdict: Verdict) -> Answer {
        Answer { verdict, errno: 0, lease_s: 0 }
    }
}

fn mode_byte(mode: Mode) -> u8 {
    match mode {
        Mode::Tls => 1,
        Mode::Auth => 2,
        Mode::None => 3,
    }
}

impl Request {
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut message = [0; REQUEST_BYTES];
        message[..4].copy_from_slice(MAGIC);
        message[4] = PROTOCOL as u8;
        message[5] = match self.kind {
            Kind::Data => 1,
            Kind::ProbeTarget => 2,
            Kind::ProbePath => 3,
        };
        message[6] = mode_byte(self.mode);
        message[8..24].copy_from_slice(&self.relay_id.0);
        message[24..26].copy_from_slice(&self.listener.to_be_bytes());
        message[28..32].copy_from_slice(&self.lease_s.to_be_bytes());
        message
    }

    /// Every byte counts: a reserved one that is not 0 is another protocol.
    pub fn decode(message: &[u8; REQUEST_BYTES]) -> Result<Request, Verdict> {
        let kind = match message[5] {
            1 => Kind::Data,
            2 => Kind::ProbeTarget,
            3 => Kind::ProbePath,
            _ => return Err(Verdict::Protocol),
        };
        let mode = match message[6] {
            1 => Mode::Tls,
            2 => Mode::Auth,
            3 => Mode::None,
            _ => return Err(Verdict::Protocol),
        };
        let mut relay_id = [0; 16];
        relay_id.copy_from_slice(&message[8..24]);
        let request = Request {
            kind,
            mode,
            relay_id: RelayId(relay_id),
            listener: u16::from_be_bytes([message[24], message[25]]),
            lease_s: u32::from_be_bytes([message[28], message[29], message[30], message[31]]),
        };
        if &request.encode() == message { Ok(request) } else { Err(Verdict::Protocol) }
    }
}

impl Answer {
    pub fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut message = [0; ANSWER_BYTES];
        message[..4].copy_from_slice(b"S2DR");
        message[4] = PROTOCOL as u8;
        message[5] = match self.verdict {
            Verdict::Ok => 0,
            Verdict::Unreachable => 1,
            Verdict::Busy => 2,
            Verdict::Denied => 3,
            Verdict::NotReady => 4,
            Verdict::Protocol => 5,
        };
        message[6..8].copy_from_slice(&self.errno.to_be_bytes());
        message[8..12].copy_from_slice(&self.lease_s.to_be_bytes());
        message
    }

    /// None: whatever answered is no relay of this protocol.
    pub fn decode(message: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        let verdict = match message[5] {
            0 => Verdict::Ok,
            1 => Verdict::Unreachable,
            2 => Verdict::Busy,
            3 => Verdict::Denied,
            4 => Verdict::NotReady,
            5 => Verdict::Protocol,
            _ => return None,
        };
        let answer = Answer {
            verdict,
            errno: u16::from_be_bytes([message[6], message[7]]),
            lease_s: u32::from_be_bytes([message[8], message[9], message[10], message[11]]),
        };
        (&answer.encode() == message).then_some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        for kind in [Kind::Data, Kind::ProbeTarget, Kind::ProbePath] {
            for mode in [Mode::Tls, Mode::Auth, Mode::None] {
                let request =
                    Request { kind, mode, relay_id: RelayId([0xa5; 16]), listener: 511, lease_s: 86_400 };
                assert_eq!(Request::decode(&request.encode()), Ok(request));
            }
        }
        let answer = Answer { verdict: Verdict::Unreachable, errno: 111, lease_s: 7 };
        assert_eq!(Answer::decode(&answer.encode()), Some(answer));
    }

    #[test]
    fn one_changed_reserved_byte_is_another_protocol() {
        let request = Request {
            kind: Kind::Data,
            mode: Mode::Tls,
            relay_id: RelayId([1; 16]),
            listener: 0,
            lease_s: 0,
        }
        .encode();
        for at in [0, 4, 7, 26, 27, 32, 63] {
            let mut changed = request;
            changed[at] ^= 0x80;
            assert_eq!(Request::decode(&changed), Err(Verdict::Protocol), "byte {at}");
        }
        let answer = Answer::of(Verdict::Ok).encode();
        for at in [0, 4, 12, 31] {
            let mut changed = answer;
            changed[at] ^= 0x80;
            assert_eq!(Answer::decode(&changed), None, "byte {at}");
        }
    }
}
