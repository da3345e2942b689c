//! Init of a machine that exists for these scenarios alone.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use pkvm_oracle::{DONE, Scenario, Seed, TAINTED, VmKind, generate, lacking, note, parse};

use crate::{kvm, run_all, sys};

/// Lines of the kernel's log, from the most urgent to the least: 3 is an error.
const WORTH_NOTING: u32 = 3;
const NR_HUGETLB: &str = "8";
/// A backtrace is long, and its head says enough.
const NOTES_MAX: usize = 4;

/// Runs everything and switches off.
pub(crate) fn main() -> ! {
    if let Err(why) = run() {
        println!("{}", lacking(&why));
    }
    println!("{DONE}");
    sys::power_off();
    // Only where that failed; init may not end.
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn run() -> Result<(), String> {
    for (kind, at) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc")] {
        sys::mount(kind, at).map_err(|errno| format!("{kind:?} cannot be mounted: {errno}"))?;
    }
    // What scenarios with hugetlb pages need; where there are none, those scenarios say so.
    let _: std::io::Result<()> = fs::write("/proc/sys/vm/nr_hugepages", NR_HUGETLB);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("{}", note(&format!("kernel {}", release.trim())));
    let mut log = Log::open().map_err(|error| format!("/dev/kmsg: {error}"))?;
    for line in log.rest().filter(|line| line.text.contains("rotected")) {
        println!("{}", note(&line.text));
    }
    kvm::Vm::new(VmKind::Protected)
        .map_err(|errno| format!("no protected VM can be made: {errno}"))?;
    let scenarios = scenarios()?;
    let mut tainted = tainted()?;
    run_all(&scenarios, || {
        let worth = log.rest().filter(LogLine::is_worth_noting);
        let mut notes: Vec<_> = worth.map(|line| line.text).take(NOTES_MAX).collect();
        let before = std::mem::replace(&mut tainted, self::tainted().unwrap_or(u64::MAX));
        if tainted != before {
            // A warning or an oops. It stays so, and is told once.
            notes.push(format!("{TAINTED} from {before:#x} to {tainted:#x}"));
        }
        notes
    });
    Ok(())
}

/// What has happened to the kernel that should not have.
fn tainted() -> Result<u64, String> {
    let text = fs::read_to_string("/proc/sys/kernel/tainted").map_err(|error| error.to_string())?;
    text.trim().parse().map_err(|_| format!("tainted is {text}"))
}

fn scenarios() -> Result<Vec<Scenario>, String> {
    let mut paths: Vec<_> = fs::read_dir("/scenarios")
        .map_err(|error| format!("/scenarios: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    let mut scenarios = Vec::new();
    for path in paths {
        let shown = path.display();
        let text = fs::read_to_string(&path).map_err(|error| format!("{shown}: {error}"))?;
        scenarios.extend(parse(&text).map_err(|misread| format!("{shown}: {misread}"))?);
    }
    if let Ok(wish) = fs::read_to_string("/generate") {
        let numbers: Vec<u64> =
            wish.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [seed, nr_scenarios] = numbers[..] else {
            return Err(format!("/generate is no seed and number: {wish}"));
        };
        let nr_scenarios = usize::try_from(nr_scenarios).map_err(|error| error.to_string())?;
        scenarios.extend(generate(Seed(seed), nr_scenarios));
    }
    Ok(scenarios)
}

impl LogLine {
    /// Errors, and the one line of a warning that says where.
    fn is_worth_noting(&self) -> bool {
        self.level <= WORTH_NOTING || self.text.starts_with("WARNING: ")
    }
}

/// The kernel's log.
struct Log(File);

struct LogLine {
    level: u32,
    text: String,
}

impl Log {
    fn open() -> std::io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Self(file))
    }

    /// Lines that were not read yet.
    fn rest(&mut self) -> impl Iterator<Item = LogLine> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => break,
                Ok(len) => lines.extend(read_record(&String::from_utf8_lossy(&record[..len]))),
                // Records that were overwritten before we came: the next read goes on after them.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(_) => break,
            }
        }
        lines.into_iter()
    }
}

/// `level,sequence,time,flags;text`, and continuation lines that we leave out.
fn read_record(record: &str) -> Option<LogLine> {
    let (head, text) = record.split_once(';')?;
    let facility_and_level: u32 = head.split(',').next()?.parse().ok()?;
    let text = text.lines().next()?.to_string();
    Some(LogLine { level: facility_and_level & 7, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_log_are_read() {
        let line = read_record("12,339,5140900,-;NET: Registered\n SUBSYSTEM=net\n").unwrap();
        assert_eq!((line.level, line.text.as_str()), (4, "NET: Registered"));
        assert!(!line.is_worth_noting());
        for text in ["3,1,1,-;kvm [201]: Failed", "4,1,1,-;WARNING: CPU: 0 PID: 1 at x.c:1"] {
            assert!(read_record(text).unwrap().is_worth_noting());
        }
        assert!(read_record("nothing").is_none());
    }
}
