//! An archive that a kernel takes for its first file system: cpio, format `newc`.

const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;

#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    nr_entries: u32,
}

impl Archive {
    pub(super) fn program(&mut self, path: &str, bytes: &[u8]) -> Result<(), String> {
        self.entry(path, PROGRAM, bytes)
    }

    pub(super) fn file(&mut self, path: &str, bytes: &[u8]) -> Result<(), String> {
        self.entry(path, FILE, bytes)
    }

    pub(super) fn directory(&mut self, path: &str) -> Result<(), String> {
        self.entry(path, DIRECTORY, &[])
    }

    pub(super) fn finish(mut self) -> Result<Vec<u8>, String> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), String> {
        let too_large = |_| format!("{path} is too large for an archive");
        let len = u32::try_from(bytes.len()).map_err(too_large)?;
        // With the zero that ends it.
        let path_len = u32::try_from(path.len() + 1).map_err(too_large)?;
        self.nr_entries += 1;
        let (owner, group, links, time, device) = (0, 0, 1, 0, 0);
        let check = 0;
        let head = [
            self.nr_entries,
            mode,
            owner,
            group,
            links,
            time,
            len,
            device,
            device,
            device,
            device,
            path_len,
            check,
        ];
        self.bytes.extend(b"070701");
        for field in head {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(bytes);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    /// Path, mode and bytes of each entry, read by the format's own rules.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let whole = archive.len();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |at: usize| {
                let text = std::str::from_utf8(&archive[6 + at * 8..14 + at * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, len, path_len) = (field(1), field(6) as usize, field(11) as usize);
            let path = String::from_utf8(archive[110..110 + path_len - 1].to_vec()).unwrap();
            let data = (110 + path_len).next_multiple_of(4);
            if path == "TRAILER!!!" {
                return entries;
            }
            entries.push((path, mode, archive[data..data + len].to_vec()));
            archive = &archive[(data + len).next_multiple_of(4)..];
            assert!((whole - archive.len()) % 4 == 0);
        }
    }

    #[test]
    fn what_is_packed_can_be_read() {
        let mut archive = Archive::default();
        archive.directory("d").unwrap();
        archive.file("d/abc", b"12345").unwrap();
        archive.program("init", b"").unwrap();
        let bytes = archive.finish().unwrap();
        let expected = [
            ("d".to_string(), DIRECTORY, Vec::new()),
            ("d/abc".to_string(), FILE, b"12345".to_vec()),
            ("init".to_string(), PROGRAM, Vec::new()),
        ];
        assert_eq!(read(&bytes), expected);
    }
}
