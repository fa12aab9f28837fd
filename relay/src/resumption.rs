//! Resumption (RFC 8446, 2.2): a further connection between the two relays of a stream proves that it is between
//! the same two with the secret of one before it, in place of keys and signatures. A ticket is good for one connection, which
//! brings the next one. Tickets are in the memory of the two relays and nowhere else; there is no early data.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use rustls::client::{
    ClientSessionStore, Resumption, TicketRequest, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::ServerName;
use rustls::server::StoresServerSessions;
use rustls::{ClientConfig, Error, NamedGroup, ServerConfig};

use crate::connection::lock;
use crate::key::{Identity, PublicKey, SPKI_BYTES};
use crate::tls::Session;

/// After so long CONS shakes hands anew: both keys are proven and ML-KEM is exchanged again.
const RESUMES_FOR: Duration = Duration::from_secs(300);
/// PROD is older by what a ticket was on the way, and more: CONS is to be the one that stops.
const HONOURS_FOR: Duration = Duration::from_secs(600);
/// As many connections as begin at the same time; more would wait for others in vain.
const MOST_KEPT: usize = 64;
/// What one CONS relay keeps, what is on its way to it and what it has dropped since. What is found missing costs a
/// connection's begin anew, so no peer's tickets make room for another's as long as there is any.
const MOST_ISSUED_TO_ONE: usize = 128;
const MOST_ISSUED: usize = 1024;

/// How a CONS relay calls one PROD relay.
pub struct Caller {
    pub pin: PublicKey,
    since: Instant,
    anew: Arc<ClientConfig>,
    again: Arc<ClientConfig>,
    tickets: Arc<Tickets>,
}

impl Caller {
    pub fn new(identity: &Identity, pin: PublicKey) -> Result<Caller, Error> {
        let (mut anew, mut again) = identity.clients(pin)?;
        let tickets = Arc::new(Tickets(Mutex::default()));
        for (config, resumes) in [(&mut anew, false), (&mut again, true)] {
            config.resumption = Resumption::store(Arc::new(Store { tickets: tickets.clone(), resumes }));
            config.send_ticket_request = Some(TicketRequest { new_session_count: 1, resumption_count: 1 });
        }
        let (anew, again) = (Arc::new(anew), Arc::new(again));
        Ok(Caller { pin, since: Instant::now(), anew, again, tickets })
    }

    pub fn is_fresh(&self) -> bool {
        self.since.elapsed() < RESUMES_FOR
    }

    /// With a ticket, if there is one; and whether there was.
    pub fn session(&self) -> Result<(Session, bool), Error> {
        let resumes = self.tickets.choose();
        let config = if resumes { &self.again } else { &self.anew };
        Ok((Session::client(config.clone())?, resumes))
    }

    /// After PROD did not know a ticket, it hardly knows the others.
    pub fn session_anew(&self) -> Result<Session, Error> {
        self.tickets.drop_all();
        Session::client(self.anew.clone())
    }
}

impl Drop for Caller {
    /// Its connections may live on, and get tickets.
    fn drop(&mut self) {
        self.tickets.close();
    }
}

#[derive(Default)]
struct Kept {
    /// The newest is the last.
    tickets: VecDeque<Tls13ClientSessionValue>,
    /// Each for a session that is being made at this moment.
    chosen: Vec<Tls13ClientSessionValue>,
    closed: bool,
}

/// The tickets of one PROD relay.
struct Tickets(Mutex<Kept>);

impl Tickets {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.0)
    }

    fn choose(&self) -> bool {
        let mut kept = self.kept();
        let ticket = kept.tickets.pop_back();
        let is_there = ticket.is_some();
        kept.chosen.extend(ticket);
        is_there
    }

    fn drop_all(&self) {
        self.kept().tickets.clear();
    }

    fn close(&self) {
        let mut kept = self.kept();
        kept.closed = true;
        kept.tickets = VecDeque::new();
    }
}

/// What the library sees of them. Which of its two configurations resumes is chosen before it asks: what comes from the first
/// shakes hands whole, what comes from the second has a ticket for certain.
struct Store {
    tickets: Arc<Tickets>,
    resumes: bool,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl ClientSessionStore for Store {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut kept = self.tickets.kept();
        if !kept.closed {
            if kept.tickets.len() == MOST_KEPT {
                kept.tickets.pop_front();
            }
            kept.tickets.push_back(ticket);
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        if self.resumes { self.tickets.kept().chosen.pop() } else { None }
    }
}

/// The configuration of a PROD relay: as `Identity::server`, and a ticket for whoever asks for one.
pub fn server(
    identity: &Identity,
    admitted: Arc<RwLock<Vec<PublicKey>>>,
) -> Result<Arc<ServerConfig>, Error> {
    let mut config = (*identity.server(admitted.clone())?).clone();
    config.max_tls13_tickets = 1;
    config.session_storage = Arc::new(Issued { admitted, sessions: Mutex::default() });
    Ok(Arc::new(config))
}

/// The sessions for which PROD has given tickets. One is worth nothing as soon as the key that it stands for is no peer's: that
/// peer shakes hands whole, and is turned away as any other would be.
struct Issued {
    admitted: Arc<RwLock<Vec<PublicKey>>>,
    sessions: Mutex<VecDeque<Resumable>>,
}

struct Resumable {
    since: Instant,
    owner: Option<PublicKey>,
    ticket: Vec<u8>,
    secrets: Vec<u8>,
}

impl Issued {
    fn sessions(&self) -> MutexGuard<'_, VecDeque<Resumable>> {
        let mut sessions = lock(&self.sessions);
        while sessions.front().is_some_and(|oldest| oldest.since.elapsed() > HONOURS_FOR) {
            sessions.pop_front();
        }
        sessions
    }

    /// The library writes the peer's raw public key into what is kept, among other things. Should there be none in it, or one that
    /// is no peer's, nobody resumes.
    fn is_a_peers(&self, secrets: &[u8]) -> bool {
        let admitted = self.admitted.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut keys = keys_in(secrets).peekable();
        keys.peek().is_some() && keys.all(|key| admitted.contains(&key))
    }
}

fn keys_in(secrets: &[u8]) -> impl Iterator<Item = PublicKey> {
    secrets.windows(SPKI_BYTES).filter_map(PublicKey::from_spki)
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

impl StoresServerSessions for Issued {
    fn put(&self, ticket: Vec<u8>, secrets: Vec<u8>) -> bool {
        let owner = keys_in(&secrets).next();
        let mut sessions = self.sessions();
        let mut places = (0..sessions.len()).filter(|place| sessions[*place].owner == owner);
        let oldest = places.next();
        if places.count() + 1 >= MOST_ISSUED_TO_ONE {
            oldest.and_then(|place| sessions.remove(place));
        } else if sessions.len() == MOST_ISSUED {
            sessions.pop_front();
        }
        sessions.push_back(Resumable { since: Instant::now(), owner, ticket, secrets });
        true
    }

    /// For TLS 1.2.
    fn get(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let mut sessions = self.sessions();
        let place = sessions.iter().rposition(|session| session.ticket == ticket)?;
        sessions.remove(place).map(|session| session.secrets).filter(|secrets| self.is_a_peers(secrets))
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Ciphers;

    fn issued(admitted: &[PublicKey]) -> Issued {
        Issued { admitted: Arc::new(RwLock::new(admitted.to_vec())), sessions: Mutex::default() }
    }

    fn key() -> PublicKey {
        Identity::generate(Ciphers::default()).unwrap().public
    }

    /// What the library keeps of a session has the key in its midst.
    fn of(key: PublicKey) -> Vec<u8> {
        [&[7; 99][..], &key.spki(), &[7; 20]].concat()
    }

    #[test]
    fn a_ticket_is_good_once_and_for_a_peer_of_this_moment() {
        let (peer, other) = (key(), key());
        let issued = issued(&[peer]);
        for (ticket, secrets) in [(1, of(peer)), (2, of(other)), (3, vec![7; 99]), (4, of(peer))] {
            assert!(issued.put(vec![ticket], secrets));
        }
        assert_eq!(issued.take(&[1]), Some(of(peer)));
        assert_eq!([1, 2, 3, 5].map(|ticket| issued.take(&[ticket])), [None, None, None, None]);
        issued.admitted.write().unwrap().clear();
        assert_eq!(issued.take(&[4]), None);
        assert!(issued.sessions().is_empty());
    }

    #[test]
    fn the_oldest_make_room_and_go_when_their_time_is_over() {
        let peer = key();
        let issued = issued(&[peer]);
        for number in 0..=MOST_ISSUED_TO_ONE {
            issued.put(number.to_be_bytes().to_vec(), of(peer));
        }
        assert_eq!(issued.sessions().len(), MOST_ISSUED_TO_ONE);
        assert_eq!(issued.take(&0_usize.to_be_bytes()), None);
        let before = Instant::now().checked_sub(HONOURS_FOR + Duration::from_secs(1)).unwrap();
        issued.sessions().iter_mut().take(9).for_each(|session| session.since = before);
        assert_eq!(issued.take(&9_usize.to_be_bytes()), None);
        assert_eq!(issued.take(&10_usize.to_be_bytes()), Some(of(peer)));
        assert_eq!(issued.sessions().len(), MOST_ISSUED_TO_ONE - 10);
    }

    #[test]
    fn a_peer_with_many_takes_no_room_from_the_others() {
        let peers: Vec<PublicKey> = (0..MOST_ISSUED / MOST_ISSUED_TO_ONE).map(|_| key()).collect();
        let issued = issued(&peers);
        for (number, peer) in peers.iter().enumerate() {
            for turn in 0..MOST_ISSUED_TO_ONE {
                issued.put([number.to_be_bytes(), turn.to_be_bytes()].concat(), of(*peer));
            }
        }
        for number in 0..MOST_ISSUED {
            issued.put(number.to_be_bytes().to_vec(), of(peers[0]));
        }
        assert_eq!(issued.sessions().len(), MOST_ISSUED);
        for (number, peer) in peers.iter().enumerate().skip(1) {
            let first = [number.to_be_bytes(), 0_usize.to_be_bytes()].concat();
            assert_eq!(issued.take(&first), Some(of(*peer)));
        }
        // One more peer is one too many: the oldest of all make room.
        let last = key();
        for number in 0..MOST_ISSUED {
            issued.put(number.to_be_bytes().to_vec(), of(last));
        }
        assert_eq!(issued.sessions().len(), MOST_ISSUED);
    }
}
