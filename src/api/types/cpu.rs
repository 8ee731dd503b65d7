//! PUT /cpu-config.

use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// PUT /cpu-config.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// Changes to CPUID.
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    /// Changes to MSRs.
    pub msr_modifiers: Vec<MsrModifier>,
    /// Capabilities of KVM to check, or not to check.
    pub kvm_capabilities: Vec<String>,
}

/// Changes to a leaf.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeafModifier {
    /// In hexadecimal.
    pub leaf: String,
    /// In hexadecimal.
    pub subleaf: String,
    /// Of KVM.
    pub flags: u32,
    /// Changes to its registers.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// A change to a register of a leaf.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// Which.
    pub register: CpuidRegister,
    /// Its bits: 0, 1, or x for those that stay.
    pub bitmap: String,
}

/// See [`CpuidRegisterModifier::register`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "names of registers")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change to an MSR.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// In hexadecimal.
    pub addr: String,
    /// Its bits: 0, 1, or x for those that stay.
    pub bitmap: String,
}

/// What a configuration file says.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// Here it is.
    Body(CpuConfig),
    /// It is in this file.
    Path(PathBuf),
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Says what is wrong with an object, which a list of alternatives would not.
        struct Source;
        impl<'de> Visitor<'de> for Source {
            type Value = CpuConfigSource;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a CPU configuration, or the path of a file with one")
            }
            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<CpuConfigSource, E> {
                Ok(CpuConfigSource::Path(path.into()))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigSource, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigSource::Body)
            }
        }
        deserializer.deserialize_any(Source)
    }
}
