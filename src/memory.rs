//! Guest RAM: layout and backing.

/// All of guest RAM; cheap to clone.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
