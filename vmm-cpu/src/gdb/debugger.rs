//! The thread that waits for debuggers and serves them.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::debuggee::Debuggee;
use super::endpoint::Endpoint;
use super::inferior::Inferior;
use super::session::{self, End};
use crate::error::{Error, Result};
use crate::threads::VcpuExit;
use crate::vm::Notifier;

/// What a VMM is told.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A vCPU stopped by itself, for another reason than a debugger's: what [`VcpuThreads::wait`] would tell. If a debugger
    /// is attached, it was told first; all vCPUs stand still then.
    ///
    /// [`VcpuThreads::wait`]: crate::VcpuThreads::wait
    Exit(VcpuExit),
    /// The debugger wants the machine to end. All vCPUs stand still.
    Killed,
}

/// What the VMM wants.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Resume,
    Finish(u8),
}

/// What there is to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// The debugger has sent something; with none connected, one wants to connect.
    Debugger,
    /// The VMM, or a vCPU.
    Vmm,
}

/// What the thread waits for.
#[derive(Debug)]
pub(super) struct Waiting {
    epoll: Epoll,
    attention: Notifier,
    orders: Receiver<Order>,
}

/// Watches a descriptor until dropped.
#[derive(Debug)]
pub(super) struct Watched<'a>(&'a Epoll, RawFd);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.ctl(ControlOperation::Delete, self.1, EpollEvent::default()) {
            tracing::warn!(%error, "gdb: a connection is still watched");
        }
    }
}

impl Waiting {
    fn new(attention: Notifier, orders: Receiver<Order>) -> io::Result<Self> {
        let this = Self { epoll: Epoll::new()?, attention, orders };
        this.add(this.attention.event_fd().as_raw_fd())?;
        Ok(this)
    }

    fn add(&self, descriptor: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, u64::from(descriptor.unsigned_abs()));
        self.epoll.ctl(ControlOperation::Add, descriptor, event)
    }

    pub(super) fn watch(&self, descriptor: RawFd) -> io::Result<Watched<'_>> {
        self.add(descriptor)?;
        Ok(Watched(&self.epoll, descriptor))
    }

    /// Waits for something to look at. Vmm comes first: what stops the machine is not to wait for the debugger.
    pub(super) fn wait(&self, debugger: Option<RawFd>) -> io::Result<Wake> {
        loop {
            let mut events = [EpollEvent::default(); 2];
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            let is = |descriptor: RawFd| {
                events.iter().take(count).any(|event| event.data() == u64::from(descriptor.unsigned_abs()))
            };
            if is(self.attention.event_fd().as_raw_fd()) {
                self.attention.take()?;
                return Ok(Wake::Vmm);
            }
            if debugger.is_some_and(is) {
                return Ok(Wake::Debugger);
            }
        }
    }

    /// What the VMM wants, if it does. A VMM that is gone wants an end.
    pub(super) fn order(&self) -> Option<Order> {
        match self.orders.try_recv() {
            Ok(order) => Some(order),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Order::Finish(0)),
        }
    }
}

/// Serves debuggers, one after another, on a thread of its own.
///
/// A debugger that attaches stops all vCPUs; when it detaches, or its connection ends in whatever way, its breakpoints go
/// and the vCPUs go on, if they ran before or it has let them run. A machine that waits to be started by a debugger thus
/// goes on waiting.
#[derive(Debug)]
pub struct Debugger {
    orders: Sender<Order>,
    attention: Notifier,
    thread: Option<JoinHandle<()>>,
}

impl Debugger {
    /// Waits for debuggers of `debuggee` at `endpoint`. `event` is called on the debugger's thread, and should do no more
    /// than pass on what it is told.
    ///
    /// This changes nothing about whether the vCPUs run. To start them call [`Debugger::resume`], or nothing if the debugger
    /// is to start them; [`VcpuThreads::resume`](crate::VcpuThreads::resume) would let them run under a debugger's hand. From
    /// here on the VMM hears of exits by `event`, not by [`VcpuThreads::wait`](crate::VcpuThreads::wait).
    ///
    /// # Errors
    /// [`Error::Host`] if the host refuses a thread or a descriptor.
    pub fn start(
        endpoint: Endpoint,
        debuggee: Debuggee,
        event: impl Fn(Event) + Send + 'static,
    ) -> Result<Self> {
        let host = |operation| move |source| Error::Host { backend: "gdb", operation, source };
        let attention = Notifier::new().map_err(host("creating an eventfd"))?;
        let clone = || attention.try_clone().map_err(host("duplicating an eventfd"));
        let (orders, receiver) = channel();
        let waiting = Waiting::new(clone()?, receiver).map_err(host("watching an eventfd"))?;
        let inferior = Inferior::new(debuggee);
        inferior.threads.notify(clone()?);
        let main = move || {
            if let Err(error) = main(&endpoint, inferior, &waiting, &event) {
                tracing::error!(%error, "gdb: no debugger can attach any more");
            }
        };
        let thread = std::thread::Builder::new()
            .name("gdb".to_owned())
            .spawn(main)
            .map_err(host("starting the debugger's thread"))?;
        Ok(Self { orders, attention, thread: Some(thread) })
    }

    /// Lets the vCPUs run, unless a debugger has attached already: then it says when.
    pub fn resume(&self) {
        self.order(Order::Resume);
    }

    /// Tells the thread; whether it is there.
    fn order(&self, order: Order) -> bool {
        // If nobody receives it, the thread has ended.
        if self.orders.send(order).is_err() {
            return false;
        }
        let notified = self.attention.notify();
        if let Err(error) = &notified {
            tracing::error!(%error, "gdb: the debugger's thread hears nothing");
        }
        notified.is_ok()
    }

    /// Ends the service: tells a debugger that waits for the machine that it has exited with `status`. The vCPUs are left
    /// as they are.
    pub fn finish(mut self, status: u8) {
        self.end(status);
    }

    fn end(&mut self, status: u8) {
        let Some(thread) = self.thread.take() else { return };
        if !self.order(Order::Finish(status)) && !thread.is_finished() {
            return;
        }
        if thread.join().is_err() {
            tracing::error!("gdb: the debugger's thread panicked");
        }
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        self.end(0);
    }
}

fn main(
    endpoint: &Endpoint,
    mut inferior: Inferior,
    waiting: &Waiting,
    event: &dyn Fn(Event),
) -> io::Result<()> {
    let listener = endpoint.as_raw_fd();
    loop {
        let wake = {
            let _watched = waiting.watch(listener)?;
            waiting.wait(Some(listener))?
        };
        match wake {
            Wake::Vmm => {
                while let Some(order) = waiting.order() {
                    match order {
                        Order::Resume => inferior.threads.resume(),
                        Order::Finish(_) => return Ok(()),
                    }
                }
                while let Some(exit) = inferior.threads.wait(Some(Duration::ZERO)) {
                    event(Event::Exit(exit));
                }
            }
            Wake::Debugger => {
                // One that has gone already is none.
                let Ok(stream) = endpoint.accept() else { continue };
                tracing::info!("gdb: a debugger attaches");
                let runs = inferior.threads.is_running();
                let ended = |exit| event(Event::Exit(exit));
                let end = inferior
                    .pause()
                    .map_err(Into::into)
                    .and_then(|()| session::serve(&mut inferior, stream, waiting, &ended))
                    .unwrap_or_else(|error| {
                        tracing::warn!(%error, "gdb: the debugger is dropped");
                        End::Lost
                    });
                let goes_on = match end {
                    End::Detached => true,
                    End::Lost => runs || inferior.was_let_go(),
                    End::Killed | End::Finished => false,
                };
                tracing::info!(?end, goes_on, "gdb: the debugger is gone");
                if let Err(error) = inferior.release(goes_on) {
                    tracing::error!(%error, "gdb: the vCPUs do not go on");
                }
                match end {
                    End::Finished => return Ok(()),
                    End::Killed => event(Event::Killed),
                    End::Detached | End::Lost => {}
                }
                while let Some(exit) = inferior.take_fate() {
                    event(Event::Exit(exit));
                }
            }
        }
    }
}
