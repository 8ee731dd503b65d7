//! `vesiclectl snapshot`: looks at the files of snapshots, and puts them together, without a VMM.

pub mod record;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};
use serde_json::{Value, json};
use vesicle::api::types::FullVmConfiguration;
use vesicle::machine::{State, read_state};
use vesicle::snapshot::draft::Draft;
use vesicle::snapshot::{Id, format, memory};

use record::{Of, Record};

/// What `vesiclectl snapshot --help` prints.
pub const HELP: &str = "\
Looks at the files of snapshots, and puts them together.

Usage: vesiclectl snapshot inspect STATE
       vesiclectl snapshot verify STATE MEMORY
       vesiclectl snapshot merge [--output FILE] BASE DIFF
       vesiclectl snapshot record --output FILE --vesicle FILE [--seconds N] STATE MEMORY [-- COMMAND...]
       vesiclectl snapshot record --output FILE --pid PID STATE MEMORY

  inspect   what a state file says, as JSON
  verify    read both files to their ends, and say what is wrong with them
  merge     put the pages of the memory file DIFF over those of BASE; the result goes with DIFF's state file
  record    note which pages a first run touches, for a load with working_set_path: of a microVM that is started for it
            and runs until COMMAND has ended, which finds its sockets in VESICLE_VSOCK and VESICLE_API, or for N seconds
            [default: 1]; or of process PID, which was loaded from the snapshot, has done what clones will do, and is paused

Without --output, merge changes BASE itself, which no snapshot can be loaded from until that is done: if it is
interrupted, it has to be done again. With it, FILE appears whole or not at all.
";

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Task {
    /// Show a state file.
    Inspect(PathBuf),
    /// Check a state file and its memory file.
    Verify(PathBuf, PathBuf),
    /// Merge memory files.
    Merge {
        /// What was there before.
        base: PathBuf,
        /// What changed since.
        diff: PathBuf,
        /// Where the result goes; `None` for into `base`.
        output: Option<PathBuf>,
    },
    /// Note which pages are touched.
    Record(Record),
}

impl Task {
    /// Takes the arguments that follow `snapshot`; `None` if they ask for help.
    ///
    /// # Errors
    /// An argument that is unknown, missing or too much.
    pub fn parse(parser: &mut Parser) -> Result<Option<Self>, lexopt::Error> {
        let (mut words, mut output) = (Vec::new(), None);
        let (mut vesicle, mut pid, mut seconds) = (None, None, None);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("output") => output = Some(PathBuf::from(parser.value()?)),
                Arg::Long("vesicle") => vesicle = Some(PathBuf::from(parser.value()?)),
                Arg::Long("pid") => pid = Some(parser.value()?.parse()?),
                Arg::Long("seconds") => seconds = Some(parser.value()?.parse()?),
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                Arg::Value(word) => words.push(word),
                other => return Err(other.unexpected()),
            }
        }
        let mut words = words.into_iter();
        let name = words.next().unwrap_or_default();
        let mut file = |what: &'static str| words.next().map(PathBuf::from).ok_or(format!("name the {what}"));
        let task = match name.to_str() {
            Some("inspect") => Self::Inspect(file("state file")?),
            Some("verify") => Self::Verify(file("state file")?, file("memory file")?),
            Some("merge") => {
                Self::Merge { base: file("base memory file")?, diff: file("diff memory file")?, output: output.take() }
            }
            Some("record") => {
                let (state, memory) = (file("state file")?, file("memory file")?);
                let output = output.take().ok_or("name the --output of record")?;
                let of = match (vesicle.take(), pid.take()) {
                    (None, Some(process)) => Of::Process(process),
                    (Some(vesicle), None) => {
                        let rest = Duration::from_secs(seconds.take().unwrap_or(1));
                        Of::Run { vesicle, command: words.by_ref().collect(), rest }
                    }
                    _ => return Err("record takes either --vesicle or --pid".into()),
                };
                Self::Record(Record { state, memory, output, of })
            }
            _ => return Err("say what to do: inspect, verify, merge or record".into()),
        };
        match words.next() {
            Some(word) => Err(Arg::Value(word).unexpected()),
            None if output.is_some() => Err("--output is for merge and record".into()),
            None if vesicle.is_some() || pid.is_some() || seconds.is_some() => {
                Err("--vesicle, --pid and --seconds are for record".into())
            }
            None => Ok(Some(task)),
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn run(&self) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Inspect(path) => {
                let (id, state) = read_state(path)?;
                println!("{}", serde_json::to_string_pretty(&describe(id, &state))?);
                Ok(())
            }
            Self::Verify(state, memory) => {
                let data = verify(state, memory)?;
                println!("{} and {} belong together; {data} bytes of memory are there", shown(state), shown(memory));
                Ok(())
            }
            Self::Merge { base, diff, output: None } => {
                let changed = merge_in_place(base, diff)?;
                println!("{changed} bytes of {} are in {}", shown(diff), shown(base));
                Ok(())
            }
            Self::Merge { base, diff, output: Some(output) } => {
                let changed = merge_to(base, diff, output)?;
                println!("{} is {} with {changed} bytes of {}", shown(output), shown(base), shown(diff));
                Ok(())
            }
            Self::Record(record) => {
                let (touched, written) = record.run()?;
                println!("{touched} bytes of {} were touched, {written} of them written", shown(&record.memory));
                Ok(())
            }
        }
    }
}

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

/// What went wrong with a file.
fn about<E: Error>(path: &Path) -> impl Fn(E) -> Box<dyn Error> + '_ {
    move |error| {
        let mut text = format!("{}: {error}", shown(path));
        let mut cause = error.source();
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text.into()
    }
}

fn describe(id: Id, state: &State) -> Value {
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let devices: Vec<_> = state
        .devices()
        .iter()
        .map(|device| {
            let queues: Vec<_> =
                device.queues.iter().map(|queue| json!({ "size": queue.size, "ready": queue.ready })).collect();
            let (status, features) = (device.registers.status, device.registers.driver_features);
            json!({ "kind": kind(device.kind), "status": status, "features": features, "queues": queues })
        })
        .collect();
    json!({
        "version": format::VERSION,
        "id": id,
        "vcpus": state.vcpus(),
        "mem_size_mib": state.config().machine.mem_size_mib,
        "devices": devices,
        "config": FullVmConfiguration::from(state.config()),
    })
}

/// Names of virtio device kinds (virtio 1.2 §5).
fn kind(number: u32) -> Value {
    match number {
        1 => json!("net"),
        2 => json!("block"),
        19 => json!("vsock"),
        other => json!(other),
    }
}

/// Reads both files of a snapshot whole; how many bytes of memory are not holes.
fn verify(state_path: &Path, memory_path: &Path) -> Result<u64, Box<dyn Error>> {
    let (id, state) = read_state(state_path)?;
    let (expected, found) = (usize::from(state.config().machine.vcpu_count), state.vcpus());
    if expected != found {
        return Err(format!("{}: {expected} vCPUs are configured, {found} have a state", shown(state_path)).into());
    }
    let (expected, found) = (state.config().virtio_devices(), state.devices().len());
    if expected != found {
        return Err(format!("{}: {expected} devices are configured, {found} have a state", shown(state_path)).into());
    }
    let size = state.ram_size();
    let open = |path: &Path| {
        let file = File::open(path).map_err(about(path))?;
        memory::check(&file, size, Some(id)).map_err(about(path)).map(|()| file)
    };
    // Where a snapshot puts the one before until it is complete.
    let file = open(memory_path).or_else(|error| open(&memory::previous(memory_path)).map_err(|_| error))?;
    for_each_piece(&file, size, |_, _| Ok(())).map_err(about(memory_path))
}

/// Hands every piece of `file` up to `size` that is not a hole to `take`; how many bytes these are.
fn for_each_piece(file: &File, size: u64, mut take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<u64> {
    let mut buffer = vec![0; PIECE];
    let mut all = 0;
    for extent in memory::data_of(file, size)? {
        for at in (extent.start..extent.end).step_by(PIECE) {
            let length = usize::try_from(extent.end - at).unwrap_or(PIECE).min(PIECE);
            file.read_exact_at(&mut buffer[..length], at)?;
            take(at, &buffer[..length])?;
            all += length as u64;
        }
    }
    Ok(all)
}

/// Both memory files, of one size; that, and the snapshot the diff belongs to.
fn open_both(base: &Path, diff: &Path, change: bool) -> Result<(File, File, u64, Id), Box<dyn Error>> {
    let base_file = OpenOptions::new().read(true).write(change).open(base).map_err(about(base))?;
    let diff_file = File::open(diff).map_err(about(diff))?;
    let place = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    if place(&base_file)? == place(&diff_file)? {
        return Err(format!("{} and {} are one file", shown(base), shown(diff)).into());
    }
    let (size, id) = memory::identify(&diff_file).map_err(about(diff))?;
    memory::check(&base_file, size, None).map_err(about(base))?;
    Ok((base_file, diff_file, size, id))
}

fn merge_in_place(base: &Path, diff: &Path) -> Result<u64, Box<dyn Error>> {
    let (file, diff_file, size, id) = open_both(base, diff, true)?;
    memory::hold(&file, true).map_err(about(base))?;
    // Until all is there it is the memory of no snapshot.
    memory::mark(&file, size, memory::NO_SNAPSHOT).map_err(about(base))?;
    file.sync_data().map_err(about(base))?;
    let changed = for_each_piece(&diff_file, size, |at, data| file.write_all_at(data, at)).map_err(about(base))?;
    file.sync_data().map_err(about(base))?;
    memory::mark(&file, size, id).map_err(about(base))?;
    file.sync_all().map_err(about(base))?;
    Ok(changed)
}

fn merge_to(base: &Path, diff: &Path, output: &Path) -> Result<u64, Box<dyn Error>> {
    let (base_file, diff_file, size, id) = open_both(base, diff, false)?;
    let draft = Draft::create(output).map_err(about(output))?;
    let file = draft.file();
    for_each_piece(&base_file, size, |at, data| file.write_all_at(data, at)).map_err(about(output))?;
    let changed = for_each_piece(&diff_file, size, |at, data| file.write_all_at(data, at)).map_err(about(output))?;
    memory::mark(file, size, id).map_err(about(output))?;
    draft.sync().map_err(about(output))?;
    draft.publish().map_err(about(output))?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PAGE: u64 = 4096;
    const SIZE: u64 = 64 * PAGE;

    /// A memory file whose pages `pages` are full of `byte`.
    fn memory_file(path: &Path, id: Id, pages: &[u64], byte: u8) {
        let file = OpenOptions::new().write(true).create_new(true).open(path).unwrap();
        for page in pages {
            file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        }
        memory::mark(&file, SIZE, id).unwrap();
    }

    fn pages(path: &Path) -> Vec<u8> {
        let content = fs::read(path).unwrap();
        assert_eq!(content.len() as u64, SIZE + memory::TRAILER);
        content[..SIZE as usize].chunks(PAGE as usize).map(|page| page[7]).collect()
    }

    fn parsed(line: &str) -> Result<Option<Task>, String> {
        Task::parse(&mut Parser::from_args(line.split_whitespace())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_diff_goes_over_its_base_in_place_or_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let [base, diff, output] = ["base", "diff", "output"].map(|name| dir.path().join(name));
        memory_file(&base, [1; 16], &[0, 1, 2, 40], 1);
        memory_file(&diff, [2; 16], &[2, 63], 2);
        let mut expected = vec![0; 64];
        for (page, byte) in [(0, 1), (1, 1), (40, 1), (2, 2), (63, 2)] {
            expected[page] = byte;
        }
        merge_to(&base, &diff, &output).unwrap();
        assert_eq!(pages(&output), expected);
        assert_eq!(pages(&base)[63], 0, "the base is left alone");
        merge_in_place(&base, &diff).unwrap();
        for path in [&base, &output] {
            assert_eq!(pages(path), expected);
            assert_eq!(memory::identify(&File::open(path).unwrap()).unwrap(), (SIZE, [2; 16]));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_cannot_be_merged_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let [base, other, text, small] = ["base", "other", "text", "small"].map(|name| dir.path().join(name));
        memory_file(&base, [1; 16], &[3], 1);
        fs::write(&text, "no memory\n").unwrap();
        fs::write(&small, [&[0; 8192][..], &fs::read(&base).unwrap()[SIZE as usize..]].concat()).unwrap();
        for (first, second, reason) in [
            (&base, &base, "are one file"),
            (&base, &text, "text: it is not a snapshot's memory file"),
            (&base, &small, "base: it is 262168 bytes long; 8192 bytes of guest memory and a trailer make 8216"),
            (&base, &other, "other: No such file"),
        ] {
            for output in [None, Some(dir.path().join("output"))] {
                let task = Task::Merge { base: first.clone(), diff: second.clone(), output };
                let error = task.run().unwrap_err().to_string();
                assert!(error.contains(reason), "{error}");
            }
        }
        assert_eq!(memory::identify(&File::open(&base).unwrap()).unwrap(), (SIZE, [1; 16]));
        assert!(!dir.path().join("output").exists());
    }

    #[test]
    fn a_state_file_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, "no state\n").unwrap();
        for task in [Task::Inspect(path.clone()), Task::Verify(path.clone(), path.clone())] {
            let error = task.run().unwrap_err();
            assert!(error.to_string().contains("state") && error.source().is_some(), "{error}");
        }
    }

    #[test]
    fn arguments_say_what_to_do_with_which_files() {
        assert_eq!(parsed("inspect a"), Ok(Some(Task::Inspect("a".into()))));
        assert_eq!(parsed("verify a b"), Ok(Some(Task::Verify("a".into(), "b".into()))));
        let merge = Task::Merge { base: "a".into(), diff: "b".into(), output: Some("c".into()) };
        assert_eq!(parsed("merge --output c a b"), Ok(Some(merge)));
        assert_eq!(parsed("merge --help"), Ok(None));
        let record = |of| Some(Task::Record(Record { state: "a".into(), memory: "b".into(), output: "w".into(), of }));
        assert_eq!(parsed("record --output w --pid 7 a b"), Ok(record(Of::Process(7))));
        let (command, rest) = (vec!["sh".into(), "-c".into()], Duration::from_secs(1));
        let run = record(Of::Run { vesicle: "v".into(), command, rest });
        assert_eq!(parsed("record --output w --vesicle v a b -- sh -c"), Ok(run));
        for wrong in ["", "explode a", "inspect", "inspect a b", "verify a", "inspect --output a b", "merge a"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        for wrong in
            ["record --output w a b", "record --pid 7 a b", "verify --pid 7 a b", "record --output w --pid 7 a b c"]
        {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
