//! The CPU's configuration.

use super::super::types;
use crate::config::{self, BitMap, Capability, ConfigError, CpuidModifier, MsrModifier, parse_number};

impl TryFrom<types::CpuidLeafModifier> for CpuidModifier {
    type Error = ConfigError;

    fn try_from(body: types::CpuidLeafModifier) -> Result<Self, ConfigError> {
        let register = |change: types::CpuidRegisterModifier| {
            Ok::<_, ConfigError>((change.register.into(), BitMap::parse(&change.bitmap, 32)?))
        };
        Ok(Self {
            leaf: parse_number("leaf", &body.leaf)?,
            subleaf: parse_number("subleaf", &body.subleaf)?,
            flags: body.flags,
            registers: body.modifiers.into_iter().map(register).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<types::MsrModifier> for MsrModifier {
    type Error = ConfigError;

    fn try_from(body: types::MsrModifier) -> Result<Self, ConfigError> {
        Ok(Self { address: parse_number("addr", &body.addr)?, bitmap: BitMap::parse(&body.bitmap, 64)? })
    }
}

impl TryFrom<types::CpuConfig> for config::CpuConfig {
    type Error = ConfigError;

    fn try_from(body: types::CpuConfig) -> Result<Self, ConfigError> {
        Ok(Self {
            cpuid_modifiers: body.cpuid_modifiers.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            msr_modifiers: body.msr_modifiers.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            kvm_capabilities: body
                .kvm_capabilities
                .iter()
                .map(|capability| Capability::parse(capability))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<&config::CpuConfig> for types::CpuConfig {
    fn from(cpu: &config::CpuConfig) -> Self {
        let leaf = |modifier: &CpuidModifier| types::CpuidLeafModifier {
            leaf: format!("{:#x}", modifier.leaf),
            subleaf: format!("{:#x}", modifier.subleaf),
            flags: modifier.flags,
            modifiers: modifier
                .registers
                .iter()
                .map(|(register, bitmap)| types::CpuidRegisterModifier {
                    register: (*register).into(),
                    bitmap: bitmap.to_string(),
                })
                .collect(),
        };
        let msr = |modifier: &MsrModifier| types::MsrModifier {
            addr: format!("{:#x}", modifier.address),
            bitmap: modifier.bitmap.to_string(),
        };
        Self {
            cpuid_modifiers: cpu.cpuid_modifiers.iter().map(leaf).collect(),
            msr_modifiers: cpu.msr_modifiers.iter().map(msr).collect(),
            kvm_capabilities: cpu.kvm_capabilities.iter().map(ToString::to_string).collect(),
        }
    }
}
