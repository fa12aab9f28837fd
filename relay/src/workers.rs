//! The threads that carry connections: each has a current-thread runtime, and a connection stays with the one it was given to.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;

use crate::socket::TcpStream;
use crate::timer::{self, Clock};

/// What a worker has open before it carries anything: epoll, its wakers, its clock and its share of the signals.
pub const DESCRIPTORS_OF_A_RUNTIME: u64 = 7;

pub struct Workers {
    handles: Vec<Handle>,
    next: AtomicUsize,
    /// Dropped with this: the threads' runtimes end, and their connections with them.
    _running: watch::Sender<()>,
}

impl Workers {
    /// `count` is at least 1; the calling thread, inside its own runtime, is the first.
    pub fn start(count: usize) -> io::Result<Workers> {
        let (running, _) = watch::channel(());
        let mut handles = vec![Handle::current()];
        for number in 1..count {
            let runtime = Builder::new_current_thread().enable_io().build()?;
            let clock = {
                let _at_worker = runtime.enter();
                Clock::new()?
            };
            handles.push(runtime.handle().clone());
            let mut stop = running.subscribe();
            std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                runtime.block_on(async move {
                    timer::start(clock);
                    let _ = stop.changed().await;
                });
            })?;
        }
        Ok(Workers { handles, next: AtomicUsize::new(0), _running: running })
    }

    /// Gives a connection to the next worker. One that cannot be watched there is dropped, which resets it; the error says why.
    pub fn spawn<F, T>(&self, socket: std::net::TcpStream, task: F) -> io::Result<()>
    where
        F: FnOnce(TcpStream) -> T,
        T: Future<Output = ()> + Send + 'static,
    {
        let worker = &self.handles[self.next.fetch_add(1, Ordering::Relaxed) % self.handles.len()];
        // From here, so that the task has no memory for how it came to its worker.
        let stream = {
            let _at_worker = worker.enter();
            TcpStream::watched(socket)?
        };
        worker.spawn(task(stream));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn what_a_worker_cannot_watch_is_an_error_and_gets_no_task() {
        Builder::new_current_thread().enable_io().build().unwrap().block_on(async {
            let workers = Workers::start(2).unwrap();
            for _ in 0..2 {
                // epoll takes no regular file, as it takes no socket when it is out of memory.
                let file = OwnedFd::from(File::open(std::env::current_exe().unwrap()).unwrap());
                let spawned = workers.spawn(file.into(), |_| -> std::future::Ready<()> { unreachable!() });
                assert_eq!(spawned.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            }
        });
    }
}
