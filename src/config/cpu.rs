//! What the guest is to see of its CPU: changes to CPUID and MSRs, and what KVM must be able to do.

use std::fmt;

use super::ConfigError;

/// A change to the bits of a register: some are set, some cleared, the others stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitMap {
    /// The bits that are changed.
    pub mask: u64,
    /// What they become.
    pub value: u64,
    /// Bits of the register.
    pub width: u32,
}

impl BitMap {
    /// Reads `0b`, then `0`, `1` or `x` for each bit down to the lowest, with underscores wherever
    /// they help. The bits in front that are left out stay.
    ///
    /// # Errors
    /// [`ConfigError::BitMap`]: another character, or more bits than `width`.
    pub fn parse(text: &str, width: u32) -> Result<Self, ConfigError> {
        let fail = || ConfigError::BitMap { bitmap: text.to_owned(), width };
        let bits: Vec<u8> = text.strip_prefix("0b").ok_or_else(fail)?.bytes().filter(|bit| *bit != b'_').collect();
        if bits.is_empty() || bits.len() > width as usize {
            return Err(fail());
        }
        let mut map = Self { mask: 0, value: 0, width };
        for bit in bits {
            let (mask, value) = match bit {
                b'0' => (1, 0),
                b'1' => (1, 1),
                b'x' => (0, 0),
                _ => return Err(fail()),
            };
            map.mask = map.mask << 1 | mask;
            map.value = map.value << 1 | value;
        }
        Ok(map)
    }

    /// `register` with the change.
    pub fn apply(&self, register: u64) -> u64 {
        register & !self.mask | self.value
    }
}

impl fmt::Display for BitMap {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("0b")?;
        for bit in (0..self.width).rev() {
            formatter.write_str(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })?;
        }
        Ok(())
    }
}

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "names of registers")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to one leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuidModifier {
    /// EAX of the instruction.
    pub leaf: u32,
    /// ECX of the instruction.
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// Each with a bit map of 32 bits.
    pub registers: Vec<(CpuidRegister, BitMap)>,
}

/// A change to one MSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrModifier {
    /// ECX of RDMSR.
    pub address: u32,
    /// Of 64 bits.
    pub bitmap: BitMap,
}

/// A change to the list of what KVM must be able to do (`KVM_CAP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Without it nothing starts.
    Required(u32),
    /// It is not needed.
    Waived(u32),
}

impl Capability {
    /// Reads `171`, or `!171` for what is not needed.
    ///
    /// # Errors
    /// [`ConfigError::Capability`]: no number.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let fail = || ConfigError::Capability(text.to_owned());
        let number = |digits: &str| match digits.bytes().all(|digit| digit.is_ascii_digit()) {
            true => digits.parse().map_err(|_| fail()),
            false => Err(fail()),
        };
        match text.strip_prefix('!') {
            Some(digits) => number(digits).map(Self::Waived),
            None => number(text).map(Self::Required),
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Required(number) => write!(formatter, "{number}"),
            Self::Waived(number) => write!(formatter, "!{number}"),
        }
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// Applied one after the other, after everything else has been decided.
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Applied one after the other to what a vCPU begins with.
    pub msr_modifiers: Vec<MsrModifier>,
    /// Changes to the list of what is checked.
    pub kvm_capabilities: Vec<Capability>,
}

/// Reads a number as these configurations write it: `0x` and hexadecimal digits, or `0b` and bits.
///
/// # Errors
/// [`ConfigError::Number`], naming the JSON field `field`.
pub fn parse_number(field: &'static str, text: &str) -> Result<u32, ConfigError> {
    let fail = || ConfigError::Number { field, value: text.to_owned() };
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => (digits, 16),
        (_, Some(digits)) => (digits, 2),
        _ => return Err(fail()),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(fail());
    }
    u32::from_str_radix(digits, radix).map_err(|_| fail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_map_sets_clears_and_leaves_alone() {
        let map = BitMap::parse("0b1_0x1", 32).unwrap();
        assert_eq!((map.mask, map.value), (0b1101, 0b1001));
        assert_eq!(map.apply(0b1_0110), 0b1_1011);
        let all = BitMap::parse(&format!("0b{}", "10".repeat(32)), 64).unwrap();
        assert_eq!(all.apply(0x1234_5678), 0xaaaa_aaaa_aaaa_aaaa);
        assert_eq!(BitMap::parse("0bx", 64).unwrap().apply(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_bit_map_is_shown_in_full_and_read_again() {
        for text in ["0b1", "0b0x1x", "0bxxxx000000000011xx00011011110010"] {
            let map = BitMap::parse(text, 32).unwrap();
            let shown = map.to_string();
            assert_eq!(shown.len(), 34);
            assert!(shown.ends_with(&text[2..]) && shown[2..].starts_with('x') || shown == text);
            assert_eq!(BitMap::parse(&shown, 32), Ok(map));
        }
    }

    #[test]
    fn what_is_no_bit_map_number_or_capability_is_refused() {
        for text in ["", "0b", "0b_", "101", "0b2", "0bX", "0b1 ", "0x1", &format!("0b{}", "x".repeat(33))] {
            let expected = ConfigError::BitMap { bitmap: text.to_owned(), width: 32 };
            assert_eq!(BitMap::parse(text, 32), Err(expected));
        }
        for text in ["", "0x", "0b", "7", "0x100000000", "0xg", "0x+1", "0b3", "-0x1"] {
            let expected = ConfigError::Number { field: "leaf", value: text.to_owned() };
            assert_eq!(parse_number("leaf", text), Err(expected));
        }
        for text in ["", "!", "!!1", "-1", "+1", "0x1", "4294967296"] {
            assert_eq!(Capability::parse(text), Err(ConfigError::Capability(text.to_owned())));
        }
        assert_eq!((parse_number("leaf", "0x8000001D"), parse_number("leaf", "0b101")), (Ok(0x8000_001d), Ok(5)));
        assert_eq!(Capability::parse("171"), Ok(Capability::Required(171)));
        assert_eq!(Capability::parse("!56").map(|capability| capability.to_string()), Ok("!56".to_owned()));
    }
}
