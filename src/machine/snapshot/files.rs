//! The files of a snapshot that is made: whole beside their places, then in them.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::MEMORY_FILE;
use super::{SnapshotError, State};
use crate::config::{SnapshotCreate, SnapshotType, VmConfig};
use crate::machine::running::Machine;
use crate::machine::{Error, layers};
use crate::random;
use crate::sandbox::landlock::restricts_paths;
use crate::snapshot::draft::Draft;
use crate::snapshot::memory::{self, Pages};
use crate::snapshot::{Id, format};

/// A snapshot's id.
pub fn new_id() -> Result<Id, Error> {
    random::bytes().map_err(|source| Error::Event("draw random bytes", source))
}

/// What goes into a memory file; `written` since the last snapshot, if that is known.
pub fn pages_of(kind: SnapshotType, written: Option<Vec<Vec<u64>>>) -> Pages {
    match (kind, written) {
        (SnapshotType::Full, _) => Pages::All,
        (SnapshotType::Diff, Some(written)) => Pages::Noted(written),
        (SnapshotType::Diff, None) => Pages::Changed,
    }
}

/// The files of a snapshot besides its memory, not in their places yet.
pub struct Files {
    path: PathBuf,
    state: Draft,
    layers: Vec<(PathBuf, Draft)>,
}

impl Files {
    /// Writes the state of a machine that is paused, and what its guest wrote to overlays.
    pub fn draft(machine: &mut Machine, config: &VmConfig, request: &SnapshotCreate, id: Id) -> Result<Self, Error> {
        let state = State::save(machine, config, &request.mem_file_path)?;
        let path = request.snapshot_path.clone();
        let content = format::encode(id, &state).map_err(SnapshotError::unusable("snapshot_path", &path))?;
        let state = Draft::create(&path).map_err(file_error("create", &path))?;
        state.file().write_all_at(&content, 0).map_err(file_error("write", &path))?;
        Ok(Self { path, state, layers: layers::write(machine, request, id)? })
    }

    /// Has all of it on disk, and then in place.
    pub fn publish(self, memory: MemoryFile) -> Result<(), Error> {
        let Self { path, state, layers } = self;
        state.sync().map_err(file_error("write", &path))?;
        layers::sync(&layers)?;
        let previous = memory::previous(&memory.path);
        memory.publish(&path)?;
        layers::publish(layers)?;
        // What goes with the state that is replaced goes with it; anything else of that name is somebody else's.
        let stale = go_together(&path, &previous);
        state.publish().map_err(file_error("create", &path))?;
        if stale {
            let _ = fs::remove_file(previous);
        }
        Ok(())
    }
}

/// A memory file that is being written.
#[derive(Debug)]
pub struct MemoryFile {
    path: PathBuf,
    place: Place,
}

/// Where it is until it is complete.
#[derive(Debug)]
enum Place {
    /// Beside its place.
    Draft(Draft),
    /// Over the one that a Diff is merged into: the whole of it is only there again when this is done.
    Base(File),
}

impl MemoryFile {
    /// Opens what `request` names for the memory of `machine`.
    pub fn open(request: &SnapshotCreate, machine: &Machine) -> Result<Self, Error> {
        let path = request.mem_file_path.clone();
        if request.kind == SnapshotType::Diff && path.exists() {
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
            let file = file.map_err(file_error("open", &path))?;
            // Held before it is looked at: until then another process may change it.
            let usable = memory::hold(&file, true).and_then(|()| memory::check(&file, machine.ram.size(), None));
            let found = usable.and_then(|()| memory::identify(&file));
            let (_, id) = found.map_err(SnapshotError::unusable(MEMORY_FILE, &path))?;
            if !machine.follows(&file, id) {
                return Err(SnapshotError::OtherBase(path).into());
            }
            return Ok(Self { path, place: Place::Base(file) });
        }
        let draft = Draft::create(&path).map_err(file_error("create", &path))?;
        Ok(Self { path, place: Place::Draft(draft) })
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        match &self.place {
            Place::Draft(draft) => draft.file(),
            Place::Base(file) => file,
        }
    }

    /// Has nobody take it for any snapshot's from here on, should it be left half merged.
    ///
    /// # Errors
    /// It cannot be written, or the machine's pages cannot be told.
    pub fn begin(&self, machine: &mut Machine) -> Result<(), SnapshotError> {
        machine.pagemap()?;
        let Place::Base(file) = &self.place else { return Ok(()) };
        machine.begin_merging(file).map_err(|source| self.error(memory::Error::Io("look at it", source)))?;
        memory::mark(file, machine.ram.size(), memory::NO_SNAPSHOT).map_err(|source| self.error(source))?;
        file.sync_data().map_err(|source| self.error(memory::Error::Io("write", source)))
    }

    /// What went wrong with it.
    pub fn error(&self, source: memory::Error) -> SnapshotError {
        SnapshotError::unusable(MEMORY_FILE, &self.path)(source)
    }

    /// Has it on disk and in place. What is there and goes with the state file at `state` stays aside until that is
    /// replaced, too: there is always a snapshot.
    fn publish(self, state: &Path) -> Result<(), Error> {
        let Self { path, place } = self;
        let draft = match place {
            Place::Base(file) => return file.sync_all().map_err(file_error("write", &path)),
            Place::Draft(draft) => draft,
        };
        draft.sync().map_err(file_error("write", &path))?;
        if go_together(state, &path) {
            fs::rename(&path, memory::previous(&path)).map_err(file_error("put aside", &path))?;
        }
        draft.publish().map_err(file_error("create", &path))
    }
}

/// Whether both are there, and one snapshot's.
fn go_together(state: &Path, memory: &Path) -> bool {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(memory);
    let Some((_, theirs)) = file.ok().and_then(|file| memory::identify(&file).ok()) else { return false };
    let content = format::read(state).ok();
    content.and_then(|(_, content)| format::check(&content).ok()).is_some_and(|header| header.id == theirs)
}

/// A snapshot's file cannot be written; maybe because its directory was given up.
pub fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| match source.kind() {
        ErrorKind::PermissionDenied if restricts_paths() => {
            Error::OutOfReach { what: "the snapshot's file", path: path.to_owned(), source }
        }
        _ => SnapshotError::File { what, path: path.to_owned(), source }.into(),
    }
}

/// Refuses what would not be the guest, and to write over what the running guest is made of, wherever `request` says.
pub fn check_request(request: &SnapshotCreate, machine: &Machine, config: &VmConfig) -> Result<(), SnapshotError> {
    if request.kind == SnapshotType::Diff && machine.lacks_pages_for_a_diff() {
        return Err(SnapshotError::Rewound);
    }
    let layers = layers::paths(config, request);
    let mut targets = [&request.snapshot_path, &request.mem_file_path].into_iter().chain(&layers);
    targets.try_for_each(|path| check_unused(path, machine, config))
}

/// Refuses to write over what the running guest is made of: its memory file, its images, its drives.
fn check_unused(path: &Path, machine: &Machine, config: &VmConfig) -> Result<(), SnapshotError> {
    let Ok(target) = fs::metadata(path) else { return Ok(()) };
    let is_target = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == (target.dev(), target.ino());
    let base = machine.ram.base().and_then(|base| base.metadata().ok());
    let source = config
        .boot_source
        .iter()
        .flat_map(|source| [Some(&source.kernel_image_path), source.initrd_path.as_ref()].into_iter().flatten());
    let drives = config.drives.iter().map(|drive| &drive.path_on_host).chain(layers::in_use(config));
    let named = source.chain(drives).filter_map(|path| fs::metadata(path).ok());
    if base.into_iter().chain(named).any(is_target) {
        return Err(SnapshotError::InUse(path.to_owned()));
    }
    Ok(())
}
