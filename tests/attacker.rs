//! What is refused to an attacker who has taken over the VMM, and by which layer: `examples/attacker.rs` tries it, and
//! what comes out must be what `SECURITY.md` says.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use common::{JAILER, Mode};

const MODES: [(Mode, &str); 4] = [
    (Mode::Plain, "plain"),
    (Mode::Jailed, "jailer"),
    (Mode::JailedWithoutMounts, "jailer --no-mount-ns"),
    (Mode::Rootless, "jailer --rootless"),
];
const THREADS: [&str; 4] = ["api", "vmm", "vcpu", "memory"];
const SECURITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/SECURITY.md");

/// What there is to attack.
struct Scene {
    dir: tempfile::TempDir,
    /// Processes of the users that attackers are.
    neighbours: Vec<(u32, Child)>,
    _sockets: Vec<UnixListener>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        // A careless neighbour: nothing but the confinement protects it.
        for path in [dir.path(), &outside] {
            fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        }
        for (name, mode) in [("secret", 0o666), ("program", 0o777)] {
            fs::write(outside.join(name), "not a program").unwrap();
            fs::set_permissions(outside.join(name), Permissions::from_mode(mode)).unwrap();
        }
        let sleep = |user| {
            let mut sleep = Command::new("sh");
            sleep.args(["-c", "trap '' ABRT 36; exec sleep 1000"]).uid(user).gid(user).spawn().unwrap()
        };
        let neighbours: Vec<_> = [20_000, 1_000].map(|user| (user, sleep(user))).into();
        let listener = UnixListener::bind(outside.join("socket")).unwrap();
        fs::set_permissions(outside.join("socket"), Permissions::from_mode(0o777)).unwrap();
        let mut sockets = vec![listener];
        for (_, neighbour) in &neighbours {
            let address = SocketAddr::from_abstract_name(format!("vesicle-{}", neighbour.id())).unwrap();
            sockets.push(UnixListener::bind_addr(&address).unwrap());
        }
        for program in [JAILER.as_path(), &attacker()] {
            let copy = dir.path().join(program.file_name().unwrap());
            fs::copy(program, copy).unwrap();
        }
        Self { dir, neighbours, _sockets: sockets }
    }

    /// What becomes of each attempt.
    fn attack(&self, mode: Mode, thread: &str, layers: &str) -> BTreeMap<String, String> {
        let outside = self.dir.path().join("outside");
        // Each tries to remove one and make another.
        let _ = fs::remove_file(outside.join("new"));
        let _ = fs::remove_file(outside.join("node"));
        fs::write(outside.join("victim"), "").unwrap();
        let program = self.dir.path().join("attacker");
        let mut command = match mode {
            Mode::Plain => {
                let mut command = Command::new(&program);
                command.uid(20_000).gid(20_000);
                command
            }
            _ => self.jailer(mode, &program),
        };
        command.args(["--thread", thread, "--layers", layers, "--outside"]).arg(&outside);
        let user = if mode == Mode::Plain { 20_000 } else { mode.user() };
        let neighbour = self.neighbours.iter().find(|(other, _)| *other == user).unwrap();
        command.args(["--neighbour", &neighbour.1.id().to_string()]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{mode:?} {thread} {layers}: {output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        said.lines().filter_map(|l| l.split_once('\t')).map(|(name, end)| (name.to_owned(), end.to_owned())).collect()
    }

    fn jailer(&self, mode: Mode, program: &Path) -> Command {
        let base = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let user = mode.user().to_string();
        let mut command = Command::new(self.dir.path().join(JAILER.file_name().unwrap()));
        command.args(["--id", "a", "--exec-file"]).arg(program).arg("--chroot-base-dir").arg(&base);
        match mode {
            Mode::Rootless => {
                std::os::unix::fs::chown(&base, Some(mode.user()), Some(mode.user())).unwrap();
                command.uid(mode.user()).gid(mode.user());
                command.arg("--rootless");
            }
            _ => drop(command.args(["--uid", &user, "--gid", &user])),
        }
        if mode == Mode::JailedWithoutMounts {
            command.arg("--no-mount-ns");
        }
        command.arg("--");
        command
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for (_, neighbour) in &mut self.neighbours {
            let _ = neighbour.kill();
            let _ = neighbour.wait();
        }
    }
}

/// It is built with these tests.
fn attacker() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vesicle")).with_file_name("examples").join("attacker")
}

/// Which layers refuse each attempt on their own to one thread.
fn layers(scene: &Scene, mode: Mode, thread: &str) -> BTreeMap<String, BTreeSet<&'static str>> {
    let bare = scene.attack(mode, thread, "none");
    let filtered = scene.attack(mode, thread, "seccomp");
    let landlocked = scene.attack(mode, thread, "landlock");
    let refusing = |attempt: &String| {
        let mut layers = BTreeSet::new();
        if filtered[attempt] == "trapped" {
            layers.insert("seccomp");
        }
        if landlocked[attempt] == "refused" && bare[attempt] == "done" {
            layers.insert("Landlock");
        }
        if bare[attempt] == "refused" {
            layers.insert(if mode == Mode::Plain { "kernel" } else { "jail" });
        }
        layers
    };
    bare.keys().map(|attempt| (attempt.clone(), refusing(attempt))).collect()
}

fn cell(layers: &BTreeSet<&str>) -> String {
    let order = ["seccomp", "Landlock", "jail", "kernel"];
    let named: Vec<_> = order.into_iter().filter(|layer| layers.contains(layer)).collect();
    if named.is_empty() { "**possible**".to_owned() } else { named.join(", ") }
}

fn table(head: &[&str], rows: &BTreeMap<String, Vec<BTreeSet<&str>>>) -> String {
    let mut text = format!("| attempt | {} |\n|---{}|\n", head.join(" | "), "|---".repeat(head.len()));
    for (attempt, cells) in rows {
        let cells: Vec<_> = cells.iter().map(cell).collect();
        text += &format!("| {attempt} | {} |\n", cells.join(" | "));
    }
    text
}

/// The table of SECURITY.md between two comments with this name.
fn documented(name: &str) -> String {
    let text = fs::read_to_string(SECURITY).unwrap();
    let part = text.split_once(&format!("<!-- {name} -->\n")).and_then(|(_, rest)| rest.split_once("<!-- end -->"));
    part.map(|(part, _)| part.to_owned()).unwrap_or_default()
}

/// What a table says of a host with this ABI of Landlock: "Landlock 4" is what refuses from ABI 4 on.
fn with_landlock(abi: u8, table: &str) -> String {
    let refuses =
        |layer: &&str| layer.strip_prefix("Landlock ").is_none_or(|least| least.parse::<u8>().unwrap() <= abi);
    let cell = |cell: &str| {
        let layers: Vec<_> = cell.trim().split(", ").filter(refuses).collect();
        let names = layers.iter().map(|layer| if layer.starts_with("Landlock ") { "Landlock" } else { layer });
        if layers.is_empty() { "**possible**".to_owned() } else { names.collect::<Vec<_>>().join(", ") }
    };
    table.lines().map(|line| line.split('|').map(cell).collect::<Vec<_>>().join(" | ") + "\n").collect()
}

fn landlock_abi() -> u8 {
    let config = vesicle::config::LandlockConfig::default();
    vesicle::sandbox::landlock::Landlock::new(&config).map_or(0, |landlock| landlock.abi())
}

#[test]
fn an_attacker_is_refused_what_the_security_page_says() {
    let scene = Scene::new();
    let (mut by_thread, mut by_mode) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, Vec<_>>::new());
    for (mode, _) in MODES {
        let threads = THREADS.map(|thread| layers(&scene, mode, thread));
        for attempt in threads[0].keys() {
            let each = threads.iter().map(|thread| thread[attempt].clone());
            // Threads share their memory: what one of them can do, all can.
            let all = each.clone().reduce(|one, other| &one & &other).unwrap();
            by_mode.entry(attempt.clone()).or_default().push(all);
            if mode == Mode::Plain {
                by_thread.insert(attempt.clone(), each.collect());
            }
        }
    }
    let abi = landlock_abi();
    let threads = table(&THREADS, &by_thread);
    let modes = table(&MODES.map(|(_, name)| name), &by_mode);
    println!("Landlock ABI {abi}\n\n{threads}\n{modes}");
    for (name, found) in [("threads", threads), ("modes", modes)] {
        let (expected, found) = (with_landlock(abi, &documented(name)), with_landlock(abi, &found));
        assert!(expected == found, "SECURITY.md says of {name}:\n{expected}\nfound:\n{found}");
    }
}
