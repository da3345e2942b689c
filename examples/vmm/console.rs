//! What people see: lines on standard output, and a progress bar where there is somebody to watch.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::run::lock;

/// Below this size a file is served before anybody has read a progress bar.
const WORTH_A_BAR: u64 = 64 << 20;
const REDRAW: Duration = Duration::from_millis(100);
const CELLS: u64 = 30;

/// The terminal, or whatever output goes to. Output that nobody reads any more is no error: what
/// counts is the exit status.
#[derive(Debug)]
pub(crate) struct Console {
    bar: Mutex<Bar>,
}

#[derive(Debug)]
struct Bar {
    /// How many bytes there are; none if no bar is wanted.
    total: Option<u64>,
    done: u64,
    started: Instant,
    drawn: Option<Instant>,
}

impl Console {
    pub(crate) fn new() -> Self {
        let bar = Bar { total: None, done: 0, started: Instant::now(), drawn: None };
        Self { bar: Mutex::new(bar) }
    }

    /// Prints a line: who says it, and what.
    pub(crate) fn say(&self, who: &str, what: &str) {
        let mut bar = lock(&self.bar);
        bar.clear();
        let _ = writeln!(stdout(), "{who:>10} | {what}");
    }

    /// Expects so many bytes.
    pub(crate) fn expect_bytes(&self, total: u64) {
        let watched = stdout().is_terminal() && stderr().is_terminal();
        let mut bar = lock(&self.bar);
        bar.total = Some(total).filter(|&total| watched && total >= WORTH_A_BAR);
        bar.started = Instant::now();
    }

    /// So many bytes have arrived in all.
    pub(crate) fn bytes_done(&self, done: u64) {
        let mut bar = lock(&self.bar);
        bar.done = done;
        if bar.drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) {
            bar.draw();
        }
    }

    /// No more bytes are coming.
    pub(crate) fn end_of_bytes(&self) {
        let mut bar = lock(&self.bar);
        bar.clear();
        bar.total = None;
    }
}

impl Bar {
    fn draw(&mut self) {
        let Some(total) = self.total else { return };
        self.drawn = Some(Instant::now());
        let _ = write!(stderr(), "\r{}", line(self.done, total, self.started.elapsed()));
        let _ = stderr().flush();
    }

    fn clear(&mut self) {
        if self.drawn.take().is_some() {
            let _ = write!(stderr(), "\r\x1b[K");
            let _ = stderr().flush();
        }
    }
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let part =
        |of: u64| u64::try_from(u128::from(done) * u128::from(of) / u128::from(total.max(1)));
    let (cells, percent) = (part(CELLS).unwrap_or(0), part(100).unwrap_or(0));
    let bar: String = (0..CELLS).map(|cell| if cell < cells { '#' } else { '.' }).collect();
    let mib = |bytes: u64| bytes >> 20;
    let per_second = (u128::from(done) * 1000 / elapsed.as_millis().max(1)) >> 20;
    format!("[{bar}] {percent:>3} % {} of {} MiB, {per_second} MiB/s ", mib(done), mib(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_as_full_as_the_bytes_say() {
        let second = Duration::from_secs(1);
        assert!(line(0, 100 << 20, second).starts_with("[....."));
        let half = line(50 << 20, 100 << 20, second);
        assert!(half.contains(&"#".repeat(15)) && !half.contains(&"#".repeat(16)));
        assert!(half.ends_with(" 50 % 50 of 100 MiB, 50 MiB/s "));
        assert!(line(u64::MAX, u64::MAX, second).contains("100 %"));
        line(0, 0, Duration::ZERO);
    }
}
