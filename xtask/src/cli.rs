//! The command line.

use crate::names;
use crate::pkvm::Wish;

pub(crate) const USAGE: &str = "\
Usage: cargo xtask test [--quick] [--only STEP,...]
       cargo xtask pkvm [--seed N] [--random N] [--boots N]
       cargo xtask list

test   runs every check that this machine allows, prints a table of what ran and what was
       skipped and why, and exits non-zero if anything failed
         --quick      leaves out what takes minutes
         --only       only these steps
pkvm   boots a real pKVM under emulation, runs all scenarios there and prints where it disagrees;
       brings emulator and kernel if they are not there (into GMEM_PKVM_DIR, or the target directory)
         --seed       of the random scenarios
         --random     how many of them
         --boots      so many, which all have to show the same
list   prints the steps and the host capabilities

GMEM_REQUIRE=NAME,...  makes a skip of these steps or host capabilities a failure
";

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Invocation {
    Help,
    List,
    Test(Options),
    Pkvm(Wish),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    only: Option<Vec<String>>,
}

impl Options {
    pub(crate) fn selects(&self, step: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|name| name == step))
    }
}

pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Invocation, String> {
    let mut args = args.into_iter();
    match args.next().as_deref() {
        Some("test") => parse_test(args).map(Invocation::Test),
        Some("pkvm") => parse_pkvm(args).map(Invocation::Pkvm),
        Some("list") => match args.next() {
            None => Ok(Invocation::List),
            Some(extra) => Err(format!("`list` takes no argument, found `{extra}`\n\n{USAGE}")),
        },
        Some("help" | "--help" | "-h") => Ok(Invocation::Help),
        Some(unknown) => Err(format!("unknown command `{unknown}`\n\n{USAGE}")),
        None => Err(format!("no command\n\n{USAGE}")),
    }
}

fn parse_test(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--only" => {
                let list = args.next().ok_or("`--only` needs a list of steps")?;
                options.only.get_or_insert_default().extend(parse_steps(&list)?);
            }
            _ => match arg.strip_prefix("--only=") {
                Some(list) => options.only.get_or_insert_default().extend(parse_steps(list)?),
                None => return Err(format!("unknown argument `{arg}`\n\n{USAGE}")),
            },
        }
    }
    Ok(options)
}

fn parse_pkvm(mut args: impl Iterator<Item = String>) -> Result<Wish, String> {
    let mut wish = Wish::default();
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("`{arg}` needs a number"));
        let no_number = |_| format!("`{arg}` needs a number");
        match arg.as_str() {
            "--seed" => wish.seed = Some(value?.parse().map_err(no_number)?),
            "--random" => wish.random = Some(value?.parse().map_err(no_number)?),
            "--boots" => wish.boots = Some(value?.parse().map_err(no_number)?),
            _ => return Err(format!("unknown argument `{arg}`\n\n{USAGE}")),
        }
    }
    Ok(wish)
}

fn parse_steps(list: &str) -> Result<Vec<String>, String> {
    let steps: Vec<_> =
        list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(String::from).collect();
    if steps.is_empty() {
        return Err("`--only` names no step".into());
    }
    match steps.iter().find(|name| !names::STEPS.contains(&name.as_str())) {
        None => Ok(steps),
        Some(unknown) => {
            Err(format!("unknown step `{unknown}`; there are {}", names::STEPS.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Invocation, String> {
        parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn everything_is_selected_unless_steps_are_named() {
        let Ok(Invocation::Test(all)) = parsed("test --quick") else { panic!("must parse") };
        assert!(all.quick && names::STEPS.iter().all(|step| all.selects(step)));

        let Ok(Invocation::Test(two)) = parsed("test --only fmt --only=loom") else {
            panic!("must parse")
        };
        assert!(two.selects("fmt") && two.selects("loom") && !two.selects("miri") && !two.quick);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for line in [
            "",
            "tests",
            "test --fast",
            "test --only",
            "test --only ,",
            "test --only=x",
            "list x",
            "pkvm now",
            "pkvm --seed",
            "pkvm --seed x",
            "pkvm --boots",
        ] {
            assert!(parsed(line).is_err(), "`{line}` was accepted");
        }
        assert_eq!(parsed("list"), Ok(Invocation::List));
        let wish = Wish { seed: Some(7), random: Some(9), boots: Some(3) };
        assert_eq!(parsed("pkvm --seed 7 --boots 3 --random 9"), Ok(Invocation::Pkvm(wish)));
        assert_eq!(parsed("pkvm"), Ok(Invocation::Pkvm(Wish::default())));
        assert_eq!(parsed("--help"), Ok(Invocation::Help));
    }

    #[test]
    fn required_names_are_known_names() {
        assert_eq!(names::parse_required(" uffd, loom,"), Ok(vec!["uffd", "loom"]));
        assert_eq!(names::parse_required(""), Ok(vec![]));
        assert!(names::parse_required("uffd,ufd").is_err_and(|why| why.contains("`ufd`")));
    }
}
