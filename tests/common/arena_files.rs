//! What the files of arenas take of the host.

use std::fs;
use std::os::unix::fs::MetadataExt;

use gmem::addr::ByteSize;

/// Those of this size: a test has a size to itself.
pub(crate) fn on_host(size: ByteSize) -> ByteSize {
    let mut sum = 0;
    for fd in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let is_arena = fs::read_link(fd.path())
            .is_ok_and(|name| name.to_string_lossy().contains("gmem-arena"));
        // Other tests close descriptors meanwhile.
        let Ok(metadata) = fs::metadata(fd.path()) else { continue };
        if is_arena && metadata.len() == size.get() {
            sum += metadata.blocks() * 512;
        }
    }
    ByteSize::from_bytes(sum)
}
