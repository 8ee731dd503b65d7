//! Why a configuration cannot be.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::{MAX_CMDLINE, MAX_INTERFACE_NAME, MAX_MEM_SIZE_MIB, MAX_VCPUS, MAX_VIRTIO_DEVICES, MIN_MTU, MacAddress};

/// A configuration that cannot be: one sentence that names the field and says what is legal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Outside 1 to [`MAX_VCPUS`].
    #[error("vcpu_count is {0}; it must be 1 to {MAX_VCPUS}")]
    VcpuCount(u8),
    /// Two threads a core cannot be shared out.
    #[error("vcpu_count is {0}; with smt it must be 1 or even")]
    OddVcpuCount(u8),
    /// Outside 1 to [`MAX_MEM_SIZE_MIB`].
    #[error("mem_size_mib is {0}; it must be 1 to {MAX_MEM_SIZE_MIB}")]
    MemSize(u64),
    /// Not a whole number of huge pages.
    #[error("mem_size_mib is {0}; with huge_pages 2M it must be even")]
    OddMemSize(u64),
    /// A static template of the peer.
    #[error("cpu_template `{0}` is not available in this release; leave it out or use `None`")]
    CpuTemplate(String),
    /// A path that names nothing.
    #[error("{0} is empty; give the path of a file")]
    EmptyPath(&'static str),
    /// A resource id outside `[A-Za-z0-9_]+`.
    #[error("{field} `{id}` is not a resource id; use letters, digits and underscores")]
    ResourceId {
        /// The JSON field.
        field: &'static str,
        /// What it held.
        id: String,
    },
    /// The path and the body name different resources.
    #[error("the path names `{path}`, but {field} in the body is `{body}`; they must be the same")]
    IdMismatch {
        /// The JSON field.
        field: &'static str,
        /// The id in the path.
        path: String,
        /// The id in the body.
        body: String,
    },
    /// Over [`MAX_CMDLINE`].
    #[error("boot_args is {0} bytes long; the kernel takes at most {MAX_CMDLINE}")]
    BootArgsLength(usize),
    /// The kernel command line is printable ASCII.
    #[error("boot_args holds the character {0:?}; only printable ASCII is allowed")]
    BootArgsCharacter(char),
    /// It becomes part of the kernel command line.
    #[error("partuuid `{0}` is not a partition UUID; use hexadecimal digits and hyphens")]
    PartUuid(String),
    /// Discard writes.
    #[error("drive `{0}` is read-only and cannot offer discard; set one of is_read_only and discard to false")]
    DiscardReadOnly(String),
    /// Nothing would be written.
    #[error("drive `{0}` is read-only and needs no overlay; leave overlay out, or set is_read_only to false")]
    OverlayReadOnly(String),
    /// There can be one.
    #[error("drive `{id}` cannot be the root device: a root device already exists, drive `{root}`")]
    SecondRoot {
        /// The new drive.
        id: String,
        /// The root drive there is.
        root: String,
    },
    /// Every device needs an interrupt line.
    #[error("`{0}` is one device too many; a microVM has at most {MAX_VIRTIO_DEVICES}")]
    TooManyDevices(String),
    /// Neither a name that an interface can have nor a descriptor.
    #[error("host_dev_name `{0}` is neither the name of a TAP, 1 to {MAX_INTERFACE_NAME} characters, nor fd:N")]
    HostDevName(String),
    /// Not an Ethernet address.
    #[error("guest_mac `{0}` is not an Ethernet address; write it like 06:00:ac:10:00:02")]
    GuestMac(String),
    /// Two interfaces with one address would confuse every network.
    #[error("guest_mac {mac} is in use by interface `{other}`; choose another address")]
    DuplicateMac {
        /// The address.
        mac: MacAddress,
        /// Who has it.
        other: String,
    },
    /// Below [`MIN_MTU`].
    #[error("mtu is {0}; it must be {MIN_MTU} to 65535")]
    Mtu(u16),
    /// CIDs below name the host and the hypervisor, the last one anybody (virtio 1.2 §5.10.4).
    #[error("guest_cid is {0}; it must be 3 to 4294967294")]
    GuestCid(u64),
    /// A PATCH that changes nothing is a mistake.
    #[error("nothing to change: {0}")]
    EmptyUpdate(&'static str),
    /// The service would be reachable from nowhere.
    #[error("network_interfaces is empty; name the interfaces that reach the metadata service")]
    MmdsWithoutInterface,
    /// An interface that does not exist.
    #[error("network_interfaces names `{0}`, which does not exist; PUT /network-interfaces/{0} first")]
    MmdsInterface(String),
    /// Not in 169.254.1.0 to 169.254.254.255.
    #[error("ipv4_address {0} is not link-local; use one from 169.254.1.0 to 169.254.254.255")]
    MmdsAddress(Ipv4Addr),
    /// No bit map, or one for a larger register.
    #[error("bitmap `{bitmap}` is not 0b and then at most {width} of 0, 1 and x")]
    BitMap {
        /// What it is.
        bitmap: String,
        /// Bits of the register.
        width: u32,
    },
    /// No number of 32 bits.
    #[error("{field} `{value}` is not a number of 32 bits; write 0x and hexadecimal digits, or 0b and bits")]
    Number {
        /// The JSON field.
        field: &'static str,
        /// What it held.
        value: String,
    },
    /// No KVM_CAP_*.
    #[error("kvm_capabilities holds `{0}`; write the number of a capability, or ! and the number of one not needed")]
    Capability(String),
    /// A file that was to hold a configuration.
    #[error("cpu-config {0:?} cannot be used: {1}")]
    CpuConfigFile(PathBuf, String),
    /// Two files are written.
    #[error("snapshot_path and mem_file_path are both {0:?}; they must be two files")]
    SnapshotOneFile(PathBuf),
    /// Memory comes from one place.
    #[error("name the memory file once, in mem_backend (or in mem_file_path, as older clients do)")]
    SnapshotMemory,
    /// Known to the API, not to this release.
    #[error("{0}")]
    Unavailable(&'static str),
}
