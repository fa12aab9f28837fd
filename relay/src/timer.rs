//! Deadlines and pauses. The runtime's own timers are a time-out of every wait for sockets: the kernel sets it and takes it back for
//! each message, a twentieth of what a short one costs, and a new one wakes the runtime by a write to itself. These are kept in
//! a list, with one timer of the kernel for the earliest (`timerfd_create(2)`), which mostly stays as it is.
//!
//! Each worker has its own, made by `start`; a pause belongs to the worker that waits for it first.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::watched;

thread_local! {
    static TIMERS: RefCell<Option<Timers>> = const { RefCell::new(None) };
}

/// One worker's.
struct Timers {
    clock: Arc<Clock>,
    /// When the clock rings; None if it does not.
    rings: Option<Instant>,
    waiting: BTreeMap<Key, Waker>,
    next_number: u64,
}

/// When, and which of those of the same moment.
type Key = (Instant, u64);

/// A timer of the kernel, watched by the runtime in which it was made.
pub struct Clock(AsyncFd<OwnedFd>);

impl Clock {
    pub fn new() -> io::Result<Clock> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        watched(timer, Interest::READABLE).map(Clock)
    }

    fn set(&self, at: Instant) {
        // No time at all would mean never.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let it_interval = Timespec::default();
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })
            .expect("a timer that is there takes any time to come");
    }

    async fn rung(&self) -> io::Result<()> {
        let mut count = [0; 8];
        self.0.async_io(Interest::READABLE, |timer| Ok(rustix::io::read(timer, &mut count)?)).await.map(drop)
    }
}

/// Gives the calling thread timers, by a clock of the runtime that it is in.
pub fn start(clock: Clock) {
    let clock = Arc::new(clock);
    let timers = Timers { clock: clock.clone(), rings: None, waiting: BTreeMap::new(), next_number: 0 };
    TIMERS.set(Some(timers));
    tokio::spawn(async move {
        let _until_the_runtime_ends = Started;
        while clock.rung().await.is_ok() {
            for waker in due() {
                waker.wake();
            }
        }
    });
}

struct Started;

impl Drop for Started {
    fn drop(&mut self) {
        // A thread that ends has no timers any more.
        let _ = TIMERS.try_with(RefCell::take);
    }
}

/// Takes out what is due, and has the clock ring for the next.
fn due() -> Vec<Waker> {
    with_timers(|timers| {
        let later = timers.waiting.split_off(&(Instant::now(), u64::MAX));
        let due = std::mem::replace(&mut timers.waiting, later);
        timers.rings = None;
        if let Some(((at, _), _)) = timers.waiting.first_key_value() {
            timers.ring_by(*at);
        }
        due.into_values().collect()
    })
}

fn with_timers<T>(call: impl FnOnce(&mut Timers) -> T) -> T {
    TIMERS.with_borrow_mut(|timers| call(timers.as_mut().expect("a worker has started its timers")))
}

/// A waker that wakes the same task stays.
fn replace(former: &mut Waker, waker: &Waker) -> Option<Waker> {
    (!former.will_wake(waker)).then(|| std::mem::replace(former, waker.clone()))
}

impl Timers {
    /// Answers the number of a pause that begins.
    fn wake(&mut self, waker: Waker, at: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.waiting.insert((at, number), waker);
        self.ring_by(at);
        number
    }

    fn ring_by(&mut self, at: Instant) {
        if self.rings.is_none_or(|rings| at < rings) {
            self.clock.set(at);
            self.rings = Some(at);
        }
    }
}

/// A pause that ends at a certain time. Nothing is kept of it before it is waited for, nor after it was dropped.
pub struct Sleep {
    at: Instant,
    number: Option<u64>,
}

pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(Instant::now() + duration)
}

pub fn sleep_until(at: Instant) -> Sleep {
    Sleep { at, number: None }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let at = self.at;
        let waker = context.waker();
        let Some(number) = self.number else {
            if at <= Instant::now() {
                return Poll::Ready(());
            }
            self.number = Some(with_timers(|timers| timers.wake(waker.clone(), at)));
            return Poll::Pending;
        };
        // Dropped out here: with it may go a task, and with that a pause, which looks for its timers.
        let _former = match with_timers(|timers| {
            timers.waiting.get_mut(&(at, number)).map(|former| replace(former, waker))
        }) {
            Some(former) => former,
            None => return Poll::Ready(()),
        };
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        // The clock rings in vain at most once for it. A runtime that ends may have dropped its timers before.
        let removed = TIMERS.try_with(|timers| {
            timers.borrow_mut().as_mut().and_then(|timers| timers.waiting.remove(&(self.at, number)))
        });
        drop(removed);
    }
}

/// The time was over before the future was ready; it has been dropped.
#[derive(Debug)]
pub struct Elapsed;

pin_project! {
    /// What `timeout` answers. By hand, because an async function would keep the future twice.
    pub struct Timeout<F> {
        #[pin]
        future: F,
        elapsed: Sleep,
    }
}

/// Waits for a future, for so long at most.
pub fn timeout<F: Future>(limit: Duration, future: F) -> Timeout<F> {
    Timeout { future, elapsed: sleep(limit) }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.future.poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(this.elapsed).poll(context).map(|()| Err(Elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::tests::runtime;

    const LONG: Duration = Duration::from_secs(3600);

    fn waiting() -> usize {
        with_timers(|timers| timers.waiting.len())
    }

    #[test]
    fn pauses_end_in_their_order_and_none_before_its_time() {
        runtime().block_on(async {
            let began = Instant::now();
            let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
            let pauses = [30, 10, 20, 10, 0].map(Duration::from_millis);
            for pause in pauses {
                let said = said.clone();
                tokio::spawn(async move {
                    sleep_until(began + pause).await;
                    assert!(Instant::now() >= began + pause);
                    said.send(pause).unwrap();
                });
            }
            drop(said);
            let mut order = Vec::new();
            while let Some(pause) = heard.recv().await {
                order.push(pause);
            }
            let mut expected = pauses;
            expected.sort();
            assert_eq!(order, expected);
            assert_eq!(waiting(), 0);
        });
    }

    #[test]
    fn a_pause_that_was_given_up_leaves_nothing_behind_and_holds_up_no_other() {
        runtime().block_on(async {
            for limit in [Duration::ZERO, Duration::from_millis(5)] {
                assert!(timeout(limit, sleep(LONG)).await.is_err());
                assert_eq!(waiting(), 0);
            }
            // The clock is set for one that is not waited for any more.
            assert!(timeout(Duration::from_millis(10), std::future::ready(())).await.is_ok());
            let mut given_up = Box::pin(sleep(Duration::from_millis(10)));
            let once =
                std::future::poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context).is_pending()));
            assert!(once.await);
            drop(given_up);
            let at = Instant::now() + Duration::from_millis(30);
            sleep_until(at).await;
            assert!(Instant::now() >= at);
        });
    }

    #[test]
    fn a_runtime_that_comes_after_another_on_its_thread_has_timers_of_its_own() {
        for _ in 0..2 {
            let runtime = runtime();
            runtime.spawn(sleep(LONG));
            runtime.block_on(sleep(Duration::from_millis(1)));
            drop(runtime);
            TIMERS.with_borrow(|timers| assert!(timers.is_none()));
        }
    }
}
