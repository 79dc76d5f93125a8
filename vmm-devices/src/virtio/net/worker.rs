//! Serves one pair of queues of a network device.

use std::os::fd::BorrowedFd;

use super::receive::Receive;
use super::transmit::Transmit;
use crate::net::NetPort;
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::queue::QueueError;

pub(super) struct PairWorker<M: DeviceMemory> {
    pub(super) receive: Receive<M>,
    pub(super) transmit: Transmit<M>,
    pub(super) port: Box<dyn NetPort>,
}

impl<M: DeviceMemory> Worker for PairWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![self.receive.queue(), self.transmit.queue()]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        // Before both: what wakes for one direction is not to be taken for the other's.
        self.port.hush();
        let sent = self.transmit.process(&mut *self.port)?;
        let received = self.receive.process(&mut *self.port)?;
        let more = sent == Progress::More || received == Progress::More;
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.port.source().into_iter().collect()
    }

    fn deadline(&self) -> Option<u64> {
        [self.transmit.deadline(), self.receive.deadline()].into_iter().flatten().min()
    }

    fn stop(&mut self) {
        self.transmit.stop();
        self.receive.stop();
    }

    /// Frames to be sent stay with their queue. One that has come is nowhere else.
    fn pause(&mut self) -> Result<(), QueueError> {
        self.receive.pause()
    }
}
