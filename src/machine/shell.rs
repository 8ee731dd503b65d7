//! A machine without content: RAM, VM, vCPUs, devices, all wired, nothing in them.

use std::sync::{Arc, Mutex, OnceLock};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::config::{Capability, HugePages, VmConfig};
use crate::devices::boot_timer::BootTimer;
use crate::devices::bus::Bus;
use crate::devices::i8042::{I8042, KEYBOARD_IRQ};
use crate::devices::io_apic::IoApic;
use crate::devices::serial::{COM1_IRQ, Serial};
use crate::devices::virtio::{INTERRUPT_USED_BUFFER, VirtioMmio, Windows};
use crate::kvm::x86_64::cpuid::Topology;
use crate::kvm::{self, EmptyVm, Kvm, Vm};
use crate::memory::{self, GuestRam, MmioDevice, VM_GENERATION_ID};
use crate::metrics::METRICS;
use crate::random;
use crate::sandbox::Confining;

impl kvm::Exits for Bus {
    fn io_in(&self, port: u16, data: &mut [u8]) {
        METRICS.vcpu.exit_io_in.inc();
        Bus::io_in(self, port, data);
    }

    fn io_out(&self, port: u16, data: &[u8]) {
        METRICS.vcpu.exit_io_out.inc();
        Bus::io_out(self, port, data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        METRICS.vcpu.exit_mmio_read.inc();
        Bus::mmio_read(self, gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        METRICS.vcpu.exit_mmio_write.inc();
        Bus::mmio_write(self, gpa, data);
    }
}

/// What decides the machine's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// vCPUs and how they share cores.
    pub topology: Topology,
    /// Guest RAM in bytes.
    pub ram_bytes: u64,
    /// Backing of guest RAM.
    pub huge_pages: HugePages,
    /// Have KVM note which pages the guest writes.
    pub log_dirty: bool,
    /// What KVM must be able to do besides.
    pub kvm_capabilities: Vec<Capability>,
}

impl From<&VmConfig> for Layout {
    fn from(config: &VmConfig) -> Self {
        let VmConfig { machine: config, cpu, .. } = config;
        Self {
            topology: Topology { vcpus: config.vcpu_count, threads_per_core: if config.smt { 2 } else { 1 } },
            ram_bytes: config.mem_size_mib << 20,
            huge_pages: config.huge_pages,
            log_dirty: config.track_dirty_pages,
            kvm_capabilities: cpu.as_ref().map(|cpu| cpu.kvm_capabilities.clone()).unwrap_or_default(),
        }
    }
}

/// See the module.
pub struct Shell {
    /// What the host's KVM can do.
    pub kvm: Kvm,
    /// vCPU descriptors; their threads start with the machine.
    pub vcpu_fds: Vec<kvm_ioctls::VcpuFd>,
    /// Everything outside RAM.
    pub bus: Arc<Bus>,
    /// The VM; dropped before the RAM its slots refer to.
    pub vm: Arc<Vm>,
    /// Guest RAM.
    pub ram: GuestRam,
    /// The registers of the virtio devices, a memory slot as well.
    pub windows: Windows,
    /// Their QueueNotify registers.
    pub kicks: Vec<EventFd>,
    /// Signalled by vCPUs.
    pub vcpu_event: Arc<EventFd>,
    /// Its threads.
    pub confining: Confining,
}

impl Shell {
    /// Builds it with room for `devices` virtio devices, in the order that KVM does fastest (see
    /// [`crate::kvm`]).
    pub fn new(layout: &Layout, devices: usize, boot_timer: Option<BootTimer>, vm: EmptyVm) -> Result<Self, Error> {
        let reserve = if layout.log_dirty { GuestRam::tracked } else { GuestRam::new };
        let ram = reserve(layout.ram_bytes, layout.huge_pages)?;
        let windows = Windows::new(devices);
        // SAFETY: a shell, and the machine it becomes, holds RAM and windows as long as the VM and
        // drops them after it.
        let (kvm, vm) = unsafe { Vm::new(vm, &layout.kvm_capabilities, &ram, layout.log_dirty, windows.slot()) }?;
        let vm = Arc::new(vm);
        let vcpu_fds = (0..layout.topology.vcpus).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
        kvm::install_kick_handler();
        let swallowed = event(libc::EFD_NONBLOCK)?;
        let kicks = (0..devices).map(|index| wire_virtio(&vm, index, &swallowed)).collect::<Result<_, _>>()?;
        let bus = Arc::new(wire(&vm, devices, boot_timer)?);
        let (vcpu_event, confining) = (Arc::new(event(0)?), Confining::default());
        Ok(Self { kvm, vcpu_fds, bus, vm, ram, windows, kicks, vcpu_event, confining })
    }
}

/// Gives the guest a generation ID that no other has.
pub fn renew_generation_id(ram: &GuestRam) -> Result<(), Error> {
    let id = random::bytes().map_err(|source| Error::Event("draw random bytes", source))?;
    let write = ram.memory().write_slice(&id, GuestAddress(VM_GENERATION_ID));
    Ok(write.map_err(|_| memory::Error::OutsideRam { gpa: VM_GENERATION_ID, len: id.len() as u64 })?)
}

/// The I/O APIC with the devices that every machine has, and pins for `devices` more.
fn wire(vm: &Arc<Vm>, devices: usize, boot_timer: Option<BootTimer>) -> Result<Bus, Error> {
    let io_apic = Arc::new(IoApic::new(memory::io_apic_pins(devices), {
        let vm = Arc::clone(vm);
        move |message| vm.signal(message.address, message.data)
    }));
    let serial = Mutex::new(Serial::new(io_apic.line(COM1_IRQ), event(libc::EFD_NONBLOCK)?));
    let i8042 = Mutex::new(I8042::new(io_apic.line(KEYBOARD_IRQ), event(libc::EFD_NONBLOCK)?));
    Ok(Bus { serial, i8042, io_apic, slots: OnceLock::new(), boot_timer })
}

/// Has KVM take the writes of virtio device `index` that need no exit: those to QueueNotify, whose
/// descriptor is returned, and those that nobody needs to hear of.
fn wire_virtio(vm: &Vm, index: usize, swallowed: &EventFd) -> Result<EventFd, Error> {
    let place = MmioDevice::nth(index).ok_or(Error::TooManyDevices)?;
    let kick = event(libc::EFD_NONBLOCK)?;
    vm.register_ioeventfd(&kick, place.base + VirtioMmio::NOTIFY_OFFSET)?;
    vm.swallow(swallowed, place.base + VirtioMmio::ACKNOWLEDGE_OFFSET, INTERRUPT_USED_BUFFER)?;
    Ok(kick)
}

fn event(flags: i32) -> Result<EventFd, Error> {
    EventFd::new(flags | libc::EFD_CLOEXEC).map_err(|source| Error::Event("create an eventfd", source))
}
