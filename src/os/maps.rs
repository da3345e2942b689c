//! What is mapped where in this process: /proc/self/maps (proc(5)).

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{fstat, major, minor};

use crate::addr::Hva;

/// A file, whatever its name is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

impl FileId {
    /// Of an open file.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = fstat(fd)?;
        Ok(Self { major: major(stat.st_dev), minor: minor(stat.st_dev), inode: stat.st_ino })
    }
}

/// One mapping.
#[derive(Debug, PartialEq, Eq)]
struct Area {
    addresses: Range<u64>,
    /// Whether whoever touches it reads and writes the file.
    is_open: bool,
    file: FileId,
    /// Where in the file it begins.
    file_start: u64,
}

/// All mappings at one moment, in ascending order.
#[derive(Debug)]
pub(crate) struct Maps(Vec<Area>);

impl Maps {
    /// Reads them.
    pub(crate) fn read() -> io::Result<Self> {
        Ok(Self(parse(&fs::read_to_string("/proc/self/maps")?)))
    }

    /// How many of the `len` bytes from `start` on are the bytes of the file from `file_start` on, up to the first
    /// that is not, or that cannot be read and written.
    pub(crate) fn matching(&self, start: Hva, len: u64, file: FileId, file_start: u64) -> u64 {
        let start = start.get() as u64;
        let first = self.0.partition_point(|area| area.addresses.end <= start);
        let mut matching = 0;
        for area in self.0.iter().skip(first) {
            let at = start.saturating_add(matching);
            let skip = at.checked_sub(area.addresses.start);
            let place = skip.and_then(|skip| area.file_start.checked_add(skip));
            let is_right = place.is_some() && place == file_start.checked_add(matching);
            if matching >= len || !is_right || !area.is_open || area.file != file {
                break;
            }
            matching = area.addresses.end - start;
        }
        matching.min(len)
    }
}

fn parse(text: &str) -> Vec<Area> {
    text.lines().filter_map(area).collect()
}

/// `7f00-8f00 rw-s 00001000 00:01 5 /memfd:name (deleted)`.
fn area(line: &str) -> Option<Area> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?;
    let file_start = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let small = |text| u32::from_str_radix(text, 16).ok();
    Some(Area {
        addresses: number(start)?..number(end)?,
        is_open: rights.starts_with("rw") && rights.ends_with('s'),
        file: FileId {
            major: small(major)?,
            minor: small(minor)?,
            inode: fields.next()?.parse().ok()?,
        },
        file_start: number(file_start)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
10000-20000 rw-s 00000000 00:01 5 /memfd:gmem-arena (deleted)
20000-30000 rw-s 00010000 00:01 5 /memfd:gmem-arena (deleted)
30000-40000 ---s 00020000 00:01 5 /memfd:gmem-arena (deleted)
50000-60000 rw-s 00040000 00:01 5 /memfd:gmem-arena (deleted)
60000-70000 rw-s 00050000 00:01 6 /memfd:gmem-arena (deleted)
70000-80000 rw-p 00060000 00:01 6 /memfd:gmem-arena (deleted)
80000-90000 rw-p 00000000 00:00 0
";

    #[test]
    fn what_is_mapped_is_compared_byte_by_byte() {
        let maps = Maps(parse(TEXT));
        assert_eq!(maps.0.len(), 7);
        let [five, six] = [5, 6].map(|inode| FileId { major: 0, minor: 1, inode });
        let matching =
            |start, len, file, file_start| maps.matching(Hva::new(start), len, file, file_start);
        assert_eq!(matching(0x1_0000, 0x1_0000, five, 0), 0x1_0000);
        assert_eq!(matching(0x1_1000, 0x1000, five, 0x1000), 0x1000);
        assert_eq!(matching(0x1_1000, 0x1_0000, five, 0x1000), 0x1_0000, "of two mappings");
        assert_eq!(matching(0x1_1000, 0x4_0000, five, 0x1000), 0x1_f000, "not to be touched");
        assert_eq!(matching(0x1_1000, 0x1000, five, 0), 0, "another place");
        assert_eq!(matching(0x1_1000, 0x1000, six, 0x1000), 0, "another file");
        assert_eq!(matching(0x4_0000, 0x1_0000, five, 0x3_0000), 0, "nothing");
        assert_eq!(
            matching(0x5_8000, 0x1_0000, five, 0x4_8000),
            0x8000,
            "another file from there on"
        );
        assert_eq!(matching(0x6_8000, 0x1_0000, six, 0x5_8000), 0x8000, "a copy from there on");
        assert_eq!(matching(0x8_0000, 0x2000, FileId::default(), 0), 0, "no file");
        assert_eq!(matching(0x9_0000, 0x1000, five, 0), 0, "behind all");
    }
}
