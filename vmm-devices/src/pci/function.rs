//! What a function is to the bridge that it stands on.

use crate::pci::config::ConfigSpace;

/// A PCI function. A [`Mutex`](std::sync::Mutex) around it is what a [`HostBridge`](super::HostBridge) takes, and it is called as a
/// [`BusDeviceMut`](crate::BusDeviceMut) is: by one vCPU thread at a time, any of them.
///
/// Just the first four methods are needed. None may call the bridge: it may be in the middle of a change to this very
/// function, and waits for it.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The same, to be changed.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// The guest loads `data.len()` bytes (1, 2, 4 or 8 as a rule; any number is to be survived) at `offset` of BAR `bar`. `data`
    /// comes filled with ones.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest stores `data` at `offset` of BAR `bar`.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);

    /// The guest loads 1 to 4 bytes within one register of configuration space; `data` comes filled with ones. To be replaced
    /// where a register is not what was last stored in it.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest stores 1 to 4 bytes within one register of configuration space. To be replaced by a function that
    /// acts on writes of its capabilities: [`ConfigSpace::write`] tells which one it was. The bridge sees to BARs and
    /// command register afterwards, whatever happened here.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }

    /// BAR `bar` answers from address `at` on, or nowhere: the guest has moved it, or switched decoding on or off. For functions
    /// that have more at those addresses than accesses, such as memory that the guest sees or a doorbell of the hypervisor's. When
    /// this is told `None`, nobody else has got the old addresses yet.
    fn bar_moved(&mut self, bar: usize, at: Option<u64>) {
        let _ = (bar, at);
    }

    /// The machine is reset, or the function gets removed and may be found again: all but configuration space, which
    /// the bridge resets, is to be as it was before the guest.
    fn reset(&mut self) {}
}
