//! FILE: opened once, checked, served to the guest, and hashed by the host on its own.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Fallible;
use crate::run::Run;

/// How much the host reads at a time to hash FILE.
const HOST_READ: usize = 1 << 20;

/// The file behind the guest's disk.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    file: File,
    opened_as: Version,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    bytes: u64,
    modified: (i64, i64),
}

impl Disk {
    /// Opens the file, which must be a regular one.
    pub(crate) fn open(path: &Path) -> Fallible<Self> {
        let trouble = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        // Without O_NONBLOCK an open of a FIFO would wait for somebody to write to it.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| trouble(&e))?;
        let kind = file.metadata().map_err(|e| trouble(&e))?.file_type();
        if kind.is_dir() {
            return Err(trouble(&"is a directory, and a disk needs a file").into());
        }
        if !kind.is_file() {
            return Err(trouble(&"is not a regular file").into());
        }
        let opened_as = Version::of(&file).map_err(|e| trouble(&e))?;
        Ok(Self { path: path.to_owned(), file, opened_as })
    }

    /// How large the file was when it was opened.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.opened_as.bytes
    }

    /// The descriptor for the device: it may move the file position, which nobody else uses.
    pub(crate) fn for_device(&self) -> Fallible<File> {
        Ok(self.file.try_clone()?)
    }

    /// The host's own hash of the file, by a way that has nothing to do with the guest's.
    pub(crate) fn hash(&self, run: &Run) -> Fallible<[u8; 32]> {
        let mut hasher = Sha256::new();
        let mut buf = vec![0; HOST_READ];
        let mut at = 0;
        loop {
            run.check()?;
            match self.file.read_at(&mut buf, at) {
                Ok(0) => break,
                Ok(len) => {
                    hasher.update(&buf[..len]);
                    at += len as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("{}: {e}", self.path.display()).into()),
            }
            run.beat();
        }
        if at != self.len_bytes() {
            return Err(self.changed().into());
        }
        Ok(hasher.finalize().into())
    }

    /// Whether the file still is what was opened.
    pub(crate) fn check_unchanged(&self) -> Fallible<()> {
        match Version::of(&self.file)? == self.opened_as {
            true => Ok(()),
            false => Err(self.changed().into()),
        }
    }

    /// Whether `path` leads to this very file.
    pub(crate) fn is_same_file(&self, path: &Path) -> bool {
        let here = self.file.metadata().map(|m| (m.dev(), m.ino()));
        let there = path.metadata().map(|m| (m.dev(), m.ino()));
        matches!((here, there), (Ok(here), Ok(there)) if here == there)
    }

    fn changed(&self) -> String {
        format!(
            "{}: the file changed while it was being served, or is not as long as it says",
            self.path.display()
        )
    }
}

impl Version {
    fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}
