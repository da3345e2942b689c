//! The files of arenas, as whoever may look into the process finds them.

use std::fs::{self, File, OpenOptions};

/// Those of this process and of this size, in no order.
pub(crate) fn of_size(bytes: u64) -> Vec<File> {
    let mut found = Vec::new();
    for fd in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let is_arena = fs::read_link(fd.path())
            .is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:gmem-arena"));
        // Other tests close descriptors meanwhile.
        let Ok(file) = OpenOptions::new().read(true).write(true).open(fd.path()) else { continue };
        if is_arena && file.metadata().unwrap().len() == bytes {
            found.push(file);
        }
    }
    found
}
