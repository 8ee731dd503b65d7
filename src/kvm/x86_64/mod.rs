//! What a vCPU holds before its first instruction.

pub mod cpuid;
pub mod msrs;
pub mod regs;
pub mod state;
