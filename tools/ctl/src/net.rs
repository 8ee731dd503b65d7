//! The host's side of a guest's network: a TAP, a subnet of four addresses, and NAT.
//!
//! Each run has names of its own, all with the same number: the TAP `vesicle7`, the nftables table `vesicle7`, the
//! subnet 10.201.0.28/30. To make the TAP is to claim the number. The TAP is gone with the last process that holds it,
//! and its address and routes with it, whatever ends the process; the table is deleted at the end, and, should that
//! not come, replaced by whoever has the number next.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

/// Where the subnets are taken from, one after the other.
const SUBNETS: u32 = u32::from_be_bytes([10, 201, 0, 0]);
/// How many there are.
const COUNT: u32 = 1 << 14;
/// A route for a larger network than this does not keep us from a corner of it.
const WIDE: u8 = 16;
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// Where the addresses of resolvers are; the second holds the real ones where the first names one on this machine.
const RESOLVERS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No TAPs in this kernel, or none for us.
    #[error("cannot make a TAP, which takes root and the kernel's module tun")]
    Tap(#[source] io::Error),
    /// Every number is taken.
    #[error("all {COUNT} networks from 10.201.0.0/16 are in use")]
    NoneLeft,
    /// Packets are not forwarded, and that could not be changed.
    #[error("cannot switch on {FORWARDING}")]
    Forwarding(#[source] io::Error),
    /// A tool is not there, or was not started.
    #[error("cannot run {tool}, which is in Debian's package {package}")]
    NoTool {
        /// Its name.
        tool: &'static str,
        /// The package.
        package: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("{command} failed: {said}")]
    Tool {
        /// The command.
        command: String,
        /// What it wrote to standard error.
        said: String,
    },
}

/// A network with one guest in it, torn down when this is dropped.
#[derive(Debug)]
pub struct Network {
    number: u32,
    tap: File,
    is_up: bool,
}

impl Network {
    /// Claims a number and makes its TAP.
    ///
    /// # Errors
    /// No TAP can be made, or there is none left.
    pub fn claim() -> Result<Self, Error> {
        let routes = run("ip", "iproute2", ["-4", "-o", "route", "show", "table", "all"], "")?;
        let taken: Vec<_> = routes.lines().filter_map(prefix).collect();
        for number in (0..COUNT).filter(|&number| taken.iter().all(|&route| !in_the_way(route, number))) {
            match open_tap(&name(number)) {
                Ok(tap) => return Ok(Self { number, tap, is_up: false }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(Error::Tap(error)),
            }
        }
        Err(Error::NoneLeft)
    }

    /// The TAP's descriptor, which the VMM has to be told of.
    pub fn fd(&self) -> RawFd {
        self.tap.as_raw_fd()
    }

    /// Leaves the TAP open to the VMM that `command` is.
    pub fn pass_to(&self, command: &mut Command) {
        let inherited = self.fd();
        let prepare = move || {
            // SAFETY: the descriptor is open: whoever spawns the command still has the network.
            let tap = unsafe { BorrowedFd::borrow_raw(inherited) };
            Ok(fcntl_setfd(tap, FdFlags::empty())?)
        };
        // SAFETY: between fork and exec the closure only makes one system call, without allocation or locks.
        unsafe { command.pre_exec(prepare) };
    }

    /// What the VMM calls the TAP it was handed.
    pub fn host_device(&self) -> String {
        format!("fd:{}", self.tap.as_raw_fd())
    }

    /// Gives the host its address, and lets the guest out. Returns whether the machine forwarded nothing before.
    ///
    /// # Errors
    /// A tool failed, or is missing.
    pub fn up(&mut self) -> Result<bool, Error> {
        let name = name(self.number);
        let (host, guest) = addresses(self.number);
        run("ip", "iproute2", ["address", "add", &format!("{host}/30"), "dev", &name], "")?;
        run("ip", "iproute2", ["link", "set", "dev", &name, "up"], "")?;
        self.is_up = true;
        run("nft", "nftables", ["-f", "-"], &rules(&name, guest))?;
        let forwards = fs::read_to_string(FORWARDING).map_err(Error::Forwarding)?;
        let was_off = forwards.trim() == "0";
        if was_off {
            fs::write(FORWARDING, "1\n").map_err(Error::Forwarding)?;
        }
        Ok(was_off)
    }

    /// The kernel argument by which the default guest sets its interface up.
    pub fn boot_argument(&self) -> String {
        let (host, guest) = addresses(self.number);
        let texts = RESOLVERS.iter().filter_map(|path| fs::read_to_string(path).ok());
        let resolver = texts.into_iter().find_map(|text| resolver(&text));
        let resolver = resolver.map(|address| format!(",{address}")).unwrap_or_default();
        format!("vesicle.net={guest}/30,{host}{resolver}")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if self.is_up {
            let _ = run("nft", "nftables", ["delete", "table", "inet", &name(self.number)], "");
        }
    }
}

fn name(number: u32) -> String {
    format!("vesicle{number}")
}

/// The addresses of the host and of the guest.
fn addresses(number: u32) -> (Ipv4Addr, Ipv4Addr) {
    let subnet = SUBNETS + 4 * number;
    ((subnet + 1).into(), (subnet + 2).into())
}

/// The guest may go anywhere but to this machine, of which it sees a resolver, if there is one, and answers to ping.
/// Nobody may begin to talk to it but this machine. It has one address of IPv4.
fn rules(name: &str, guest: Ipv4Addr) -> String {
    format!(
        r#"table inet {name} {{}}
delete table inet {name}
table inet {name} {{
    chain prerouting {{
        type filter hook prerouting priority raw;
        iifname "{name}" ip saddr != {guest} drop
        iifname "{name}" meta nfproto ipv6 drop
    }}
    chain input {{
        type filter hook input priority filter;
        iifname "{name}" ct state established,related accept
        iifname "{name}" icmp type echo-request accept
        iifname "{name}" meta l4proto {{ tcp, udp }} th dport 53 accept
        iifname "{name}" drop
    }}
    chain forward {{
        type filter hook forward priority filter;
        oifname "{name}" ct state established,related accept
        oifname "{name}" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        ip saddr {guest} oifname != "{name}" masquerade
    }}
}}
"#
    )
}

/// The network and the length of the prefix in a line of `ip route`, `None` where there is neither.
fn prefix(line: &str) -> Option<(u32, u8)> {
    // Some lines begin with the route's type.
    let word = line.split_whitespace().take(2).find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let (address, length) = word.split_once('/').unwrap_or((word, "32"));
    Some((address.parse::<Ipv4Addr>().ok()?.into(), length.parse().ok().filter(|&length| length <= 32)?))
}

/// Whether a route is for some of a subnet's addresses.
fn in_the_way((network, length): (u32, u8), number: u32) -> bool {
    let shorter = length.min(30);
    let mask = u32::MAX.checked_shl(32 - u32::from(shorter)).unwrap_or(0);
    length > WIDE && (network ^ (SUBNETS + 4 * number)) & mask == 0
}

/// The first resolver in a resolv.conf that a guest can reach.
fn resolver(text: &str) -> Option<Ipv4Addr> {
    text.lines().find_map(|line| {
        let address: Ipv4Addr = line.trim().strip_prefix("nameserver")?.trim().parse().ok()?;
        (!address.is_loopback() && !address.is_unspecified()).then_some(address)
    })
}

/// Makes a TAP that is gone when it is closed.
fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // SAFETY: an ifreq is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    // The kernel takes 16 bits, and a sign means nothing.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, with a name that ends in a NUL, and the descriptor is open.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs a tool with this input, out of reach of the terminal's signals; returns what it writes.
fn run<S: AsRef<OsStr>>(
    tool: &'static str,
    package: &'static str,
    words: impl IntoIterator<Item = S>,
    input: &str,
) -> Result<String, Error> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(tool);
    command.args(words).env("PATH", path).env("LC_ALL", "C").process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |source| Error::NoTool { tool, package, source };
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut to) = child.stdin.take() {
        // One that does not read says itself why.
        let _ = to.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(Error::Tool { command: format!("{command:?}"), said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_a_subnet_of_its_own() {
        assert_eq!(addresses(0), (Ipv4Addr::new(10, 201, 0, 1), Ipv4Addr::new(10, 201, 0, 2)));
        assert_eq!(addresses(COUNT - 1), (Ipv4Addr::new(10, 201, 255, 253), Ipv4Addr::new(10, 201, 255, 254)));
        assert!(name(COUNT - 1).len() < libc::IFNAMSIZ);
    }

    #[test]
    fn what_is_routed_elsewhere_is_left_alone() {
        for (line, expected) in [
            ("default via 10.0.2.2 dev eth0", None),
            ("10.201.0.0/24 dev eth0 proto kernel scope link src 10.201.0.9", Some([true, true, false])),
            (
                "local 10.201.0.6 dev vesicle1 table local proto kernel scope host src 10.201.0.6",
                Some([false, true, false]),
            ),
            ("broadcast 10.201.0.3 dev vesicle0 table local", Some([true, false, false])),
            ("unreachable 10.201.1.0/30", Some([false, false, true])),
            ("10.0.0.0/8 via 10.0.2.2 dev eth0", Some([false; 3])),
            ("0.0.0.0/0 dev eth0", Some([false; 3])),
            ("172.17.0.0/16 dev docker0", Some([false; 3])),
            ("10.201.0.0/99 dev eth0", None),
            ("", None),
        ] {
            let found = prefix(line).map(|route| [0, 1, 64].map(|number| in_the_way(route, number)));
            assert_eq!(found, expected, "{line}");
        }
    }

    #[test]
    fn a_resolver_on_this_machine_is_none_for_a_guest() {
        let text = "# nameserver 1.1.1.1\nsearch example\nnameserver 127.0.0.53\nnameserver fe80::1\n\
            nameserver  192.0.2.53\nnameserver 192.0.2.54\n";
        assert_eq!(resolver(text), Some(Ipv4Addr::new(192, 0, 2, 53)));
        assert_eq!(resolver("nameserver ::1\nnameserver 0.0.0.0\n"), None);
    }

    #[test]
    fn a_tool_that_fails_is_quoted() {
        let error = run("sh", "dash", ["-c", "cat >&2; exit 3"], "why").unwrap_err();
        assert!(matches!(&error, Error::Tool { said, .. } if said == "why"), "{error}");
        let error = run("no-such-tool", "nowhere", ["x"], "").unwrap_err();
        assert!(error.to_string().contains("package nowhere"), "{error}");
    }
}
