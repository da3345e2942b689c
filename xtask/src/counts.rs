//! How many tests a run executed, read from what the test runner printed.

use std::fmt;
use std::iter::Sum;
use std::ops::AddAssign;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    pub(crate) const ONE_PASSED: Self = Self { passed: 1, failed: 0, skipped: 0 };
    pub(crate) const ONE_FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };

    /// Nothing was executed.
    pub(crate) fn is_empty(self) -> bool {
        self.passed + self.failed == 0
    }

    /// The runner took `tests` for passed that said themselves that they skipped.
    pub(crate) fn demote(&mut self, tests: u64) {
        let tests = tests.min(self.passed);
        self.passed -= tests;
        self.skipped += tests;
    }

    /// Sums every closing line of nextest, or else of libtest. Not both: nextest shows libtest's
    /// closing lines of those tests that failed.
    pub(crate) fn parse(output: &str) -> Self {
        let plain = strip_ansi(output);
        let summaries: Vec<_> = plain.lines().filter_map(nextest).collect();
        if summaries.is_empty() {
            return plain.lines().filter_map(libtest).sum();
        }
        summaries.into_iter().sum()
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        let mut total = Self::default();
        iter.for_each(|counts| total += counts);
        total
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.1s`
fn libtest(line: &str) -> Option<Counts> {
    let (_, list) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = Counts::default();
    for part in list.split(';') {
        let Some((number, what)) = number_and_word(part) else { continue };
        match what {
            "passed" => counts.passed += number,
            "failed" => counts.failed += number,
            "ignored" => counts.skipped += number,
            // Filtered out: this run was not asked for them.
            _ => {}
        }
    }
    Some(counts)
}

/// `Summary [ 1.2s] 5 tests run: 4 passed (1 slow), 1 failed, 2 skipped`
fn nextest(line: &str) -> Option<Counts> {
    let (_, rest) = line.trim_start().strip_prefix("Summary [")?.split_once(']')?;
    let (_, list) = rest.split_once(" run: ")?;
    let mut counts = Counts::default();
    for part in outside_parentheses(list).split(',') {
        let Some((number, what)) = number_and_word(part) else { continue };
        match what {
            "passed" => counts.passed += number,
            "skipped" => counts.skipped += number,
            // `failed`, `exec failed`, `timed out`, and whatever else did not pass.
            _ => counts.failed += number,
        }
    }
    Some(counts)
}

fn number_and_word(part: &str) -> Option<(u64, &str)> {
    let (number, what) = part.trim().split_once(' ')?;
    Some((number.parse().ok()?, what.trim()))
}

fn outside_parentheses(text: &str) -> String {
    let mut depth = 0_u32;
    text.chars()
        .filter(|c| match c {
            '(' => {
                depth += 1;
                false
            }
            ')' => {
                depth = depth.saturating_sub(1);
                false
            }
            _ => depth == 0,
        })
        .collect()
}

/// Removes colour codes: `ESC [ ... letter`.
pub(crate) fn strip_ansi(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            chars.by_ref().skip(1).find(char::is_ascii_alphabetic);
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts { passed, failed, skipped }
    }

    #[test]
    fn libtest_lines_are_summed() {
        let output = "\
running 6 tests
test addr::tests::nothing_wraps ... ok

test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.20s
";
        assert_eq!(Counts::parse(output), counts(7, 3, 1));
    }

    #[test]
    fn nextest_summaries_are_read() {
        let clean = "     Summary [   0.012s] 5 tests run: 5 passed, 2 skipped";
        assert_eq!(Counts::parse(clean), counts(5, 0, 2));

        let mixed = "     Summary [  61.0s] 9/12 tests run: 5 passed (1 slow, 1 flaky), 2 failed, \
                     1 exec failed, 1 timed out, 0 skipped";
        assert_eq!(Counts::parse(mixed), counts(5, 4, 0));

        let quoting = "    test result: FAILED. 0 passed; 1 failed; 0 ignored\n\
                       test result: FAILED. 0 passed; 1 failed; 0 ignored\n  \
                       Summary [  1s] 2 tests run: 1 passed, 1 failed, 0 skipped";
        assert_eq!(Counts::parse(quoting), counts(1, 1, 0));
    }

    #[test]
    fn colours_do_not_hide_a_summary() {
        let coloured = "\u{1b}[32;1m     Summary\u{1b}[0m [   0.5s] \u{1b}[1m1\u{1b}[0m test run: \u{1b}[1m1\
             \u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, \u{1b}[1m0\u{1b}[0m skipped";
        assert_eq!(Counts::parse(coloured), counts(1, 0, 0));
    }

    #[test]
    fn output_without_a_closing_line_counts_nothing() {
        let output = "running 0 tests\nSummary of the matter: 5 passed\n3 passed, 0 failed";
        assert!(Counts::parse(output).is_empty());
    }

    #[test]
    fn tests_that_skipped_themselves_are_no_passes() {
        let mut some = counts(3, 1, 0);
        some.demote(2);
        assert_eq!(some, counts(1, 1, 2));
        some.demote(9);
        assert_eq!(some, counts(0, 1, 3));
    }
}
