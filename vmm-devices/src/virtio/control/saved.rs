//! A device that is paused, saved, restored, and goes on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueState;

use super::{AtWork, Control, Signal, Started, status};
use crate::error::StateError;
use crate::virtio::device::{ActivateError, DeviceMemory, DriverLink as _};
use crate::virtio::executor::Running;
use crate::virtio::queue::Position;
use crate::virtio::state::{VirtioState, VirtioStateError, VirtqueueState};

const DEVICE: &str = "virtio";

/// Bytes of the configuration that are saved at most: as many as MMIO has room for.
const CONFIG: usize = 256;

/// Whether a device with that status serves its queues.
fn is_at_work(status: u8) -> bool {
    status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
}

impl<M: DeviceMemory, S: Signal + 'static> Control<M, S> {
    /// Brings the device to rest, until it is resumed or reset.
    pub(crate) fn pause(&mut self) {
        let Some(started) = &mut self.started else { return };
        let AtWork::Running(running) = std::mem::replace(&mut started.at_work, AtWork::Paused(Vec::new()))
        else {
            return;
        };
        let mut workers = Running::pause(running);
        started.doorbells.disconnect();
        for worker in &mut workers {
            // One that has given up touches no queue any more.
            if is_at_work(self.link.status())
                && let Err(error) = worker.pause()
            {
                self.link.needs_reset(&error);
            }
        }
        if !is_at_work(self.link.status()) {
            workers.iter_mut().for_each(|worker| worker.stop());
        }
        started.at_work = AtWork::Paused(workers);
    }

    /// Chains that were taken and not completed: by queue, and in the order in which they were taken.
    pub(crate) fn in_flight(&self) -> Vec<(u16, u16)> {
        let started = self.started.as_ref().filter(|_| is_at_work(self.status()));
        let positions = (0..).zip(started.iter().flat_map(|started| &started.positions));
        let of_queue = |(queue, position): (u16, &Option<Arc<Position>>)| {
            let heads = position.as_ref().map(|position| position.in_flight()).unwrap_or_default();
            heads.into_iter().map(move |head| (queue, head))
        };
        positions.flat_map(of_queue).collect()
    }

    /// Goes on.
    ///
    /// # Errors
    /// If the executor cannot; the device needs a reset then.
    pub(crate) fn resume(&mut self) -> io::Result<()> {
        let Some(Started { doorbells, at_work: AtWork::Paused(workers), .. }) = &mut self.started else {
            return Ok(());
        };
        // One that has given up waits for its reset.
        if !is_at_work(self.link.status()) {
            return Ok(());
        }
        let (doorbells, workers) = (Arc::clone(doorbells), std::mem::take(workers));
        let running = self.executor.start(Arc::<super::Link<S>>::clone(&self.link), &doorbells, workers);
        match running {
            Ok(running) => {
                if let Some(started) = &mut self.started {
                    started.at_work = AtWork::Running(running);
                }
            }
            Err(error) => {
                self.link.needs_reset(&error);
                return Err(error);
            }
        }
        if std::mem::take(&mut self.config_news) {
            self.link.config_changed();
        }
        // Who rang meanwhile, or before the device was saved, may have been heard by nobody.
        doorbells.ring_all();
        Ok(())
    }

    /// The device as it is.
    ///
    /// # Errors
    /// If it is at work, or cannot be saved.
    pub(crate) fn save(&self) -> Result<VirtioState, VirtioStateError> {
        if self.started.as_ref().is_some_and(|started| matches!(started.at_work, AtWork::Running(_))) {
            return Err(VirtioStateError::Running);
        }
        let device_type = self.device.device_type().0;
        let device = self.device.save().ok_or(VirtioStateError::Unsupported { device_type })?;
        Ok(VirtioState {
            device_type,
            status: self.status(),
            features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            config_generation: self.config_generation(),
            config: self.config(),
            queues: (0..).zip(&self.queues).map(|(index, queue)| self.queue_state(index, queue)).collect(),
            device,
        })
    }

    fn queue_state(&self, index: usize, queue: &QueueState) -> VirtqueueState {
        // A queue of a device that has given up is worth nothing until it is reset.
        let started = self.started.as_ref().filter(|_| is_at_work(self.status()));
        let position = started.and_then(|started| started.positions.get(index)?.as_ref());
        let [next_available, next_used, told] = position.map(|p| p.indices()).unwrap_or_default();
        VirtqueueState {
            max_size: queue.max_size,
            size: queue.size,
            ready: queue.ready,
            descriptors: queue.desc_table,
            available: queue.avail_ring,
            used: queue.used_ring,
            next_available,
            next_used,
            told,
            in_flight: position.map(|position| position.in_flight()).unwrap_or_default(),
        }
    }

    /// The configuration as the driver reads it, without zeros at its end.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        for (offset, part) in (0..).step_by(8).zip(config.chunks_mut(8)) {
            self.device.read_config(offset, part);
        }
        let len = config.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        config.truncate(len);
        config
    }

    /// Goes on from a saved state, paused.
    ///
    /// # Errors
    /// If it cannot; nothing has changed.
    pub(crate) fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioStateError> {
        if self.status() != 0 || self.started.is_some() {
            return Err(VirtioStateError::InUse);
        }
        self.check(state)?;
        let (anew, features) = (self.queues.clone(), self.driver_features);
        self.driver_features = state.features;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            *queue = QueueState {
                next_avail: saved.next_available,
                next_used: saved.next_used,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
                ..*queue
            };
        }
        match self.begin(state) {
            Ok(started) => self.started = started,
            Err(error) => {
                (self.queues, self.driver_features) = (anew, features);
                return Err(error);
            }
        }
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        // Another one than before, for a driver that was saved while it read.
        self.generation_ahead =
            state.config_generation.wrapping_add(1).wrapping_sub(self.device.config_generation());
        self.config_news = self.started.is_some() && self.config() != state.config;
        self.link.status.store(state.status, Ordering::SeqCst);
        Ok(())
    }

    /// Gives the device its state, and its queues if it was at work.
    fn begin(&mut self, state: &VirtioState) -> Result<Option<Started>, VirtioStateError> {
        if !is_at_work(state.status) {
            self.device.restore(&state.device, state.features)?;
            return Ok(None);
        }
        // Before the device hears of anything.
        let (queues, positions) = self.take_queues(Some(&state.queues)).map_err(ActivateError::from)?;
        self.device.restore(&state.device, state.features)?;
        match self.activate(queues) {
            Ok((doorbells, workers)) => {
                Ok(Some(Started { doorbells, positions, at_work: AtWork::Paused(workers) }))
            }
            Err(error) => {
                self.device.reset(Vec::new());
                Err(error.into())
            }
        }
    }

    /// Whether the device can be in that state, as far as that is not for the device itself to say.
    fn check(&self, state: &VirtioState) -> Result<(), StateError> {
        let check =
            |valid: bool, field, value: u64, allowed| StateError::check(valid, DEVICE, field, value, allowed);
        let has = |bit: u8| state.status & bit != 0;
        let kind = self.device.device_type().0;
        check(state.device_type == kind, "device_type", state.device_type.into(), "the device's")?;
        let known = status::OF_DRIVER | status::NEEDS_RESET;
        check(state.status & !known == 0, "status", state.status.into(), "bits 0 to 3, 6 and 7")?;
        let working = is_at_work(state.status);
        let agreed = has(status::FEATURES_OK);
        check(agreed || !working, "status", state.status.into(), "DRIVER_OK with FEATURES_OK")?;
        let acceptable = !agreed || self.are_acceptable(state.features);
        check(acceptable, "features", state.features, "those that the device offers, and that go together")?;
        check(state.config.len() <= CONFIG, "length of config", state.config.len() as u64, "0 to 256")?;
        let (count, own) = (state.queues.len(), self.queues.len());
        check(count == own, "number of queues", count as u64, "the device's")?;
        for (queue, own) in state.queues.iter().zip(&self.queues) {
            check(queue.max_size == own.max_size, "max_size", queue.max_size.into(), "the device's")?;
            let sound = queue.size.is_power_of_two() && queue.size <= queue.max_size;
            check(sound, "size", queue.size.into(), "powers of two up to max_size")?;
            let in_flight = queue.in_flight.len() as u64;
            if !working || !queue.ready {
                let indices = u64::from(queue.next_available | queue.next_used | queue.told);
                check(indices == 0, "indices", indices, "0 where the queue is not at work")?;
                check(in_flight == 0, "in_flight", in_flight, "none where the queue is not at work")?;
            }
            let apart = queue.next_available.wrapping_sub(queue.next_used);
            check(u64::from(apart) == in_flight, "in_flight", in_flight, "as many as taken and not used")?;
            let mut seen = vec![false; usize::from(queue.size)];
            for head in &queue.in_flight {
                let new = seen.get_mut(usize::from(*head)).is_some_and(|seen| !std::mem::replace(seen, true));
                check(new, "in_flight", (*head).into(), "descriptors of the queue, each once")?;
            }
        }
        Ok(())
    }
}
