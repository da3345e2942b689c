//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use gmem::ArenaBacking;
use gmem::hyp::{Model, VmKind};

const USAGE: &str = "\
Boots a guest on gmem and lets it read FILE from a virtio disk, with everything that can be tried
against its memory being tried meanwhile.

usage: vmm [--hypervisor NAME] [--guest KIND] [--backing KIND] [--json] [--map FILE.svg]
           [FILE]

  FILE             what the disk holds; a regular file of any size (default: this program itself)
  --hypervisor NAME
                   what runs the guest: HYPERVISORS
  --guest KIND     protected or non-protected: whether its memory is its own (default: protected)
  --backing KIND   what its memory is made of: hugetlb, thp, memfd, or the best that is to be had
                   (default: auto)
  --json           print a summary as one line of JSON at the end, also of a run that fails; only a
                   wrong command line and a run that hangs have none
  --map FILE.svg   write a picture of the guest's memory, taken while a request is in flight
  --help           print this

Exit status: 0 if everything held, 1 if something did not, 2 for a wrong command line.";

/// What `--help` prints.
pub(crate) fn usage() -> String {
    let names = Model::ALL.map(Model::name).join(", ");
    USAGE.replace("HYPERVISORS", &format!("{names} (default: {})", Model::default()))
}

/// What to run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) json: bool,
    pub(crate) map: Option<PathBuf>,
    pub(crate) hypervisor: Model,
    pub(crate) guest: VmKind,
    pub(crate) backing: Backing,
    pub(crate) file: Option<PathBuf>,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Run(Args),
    Help,
}

/// The `--backing` option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    Auto,
    Only(ArenaBacking),
}

impl Backing {
    /// The backings to try, best first.
    pub(crate) fn order(self) -> Vec<ArenaBacking> {
        match self {
            // Not hugetlb, though it is faster: the kernel revokes its pages 2 MiB at a time only,
            // and this guest shares single pages of 4 KiB.
            Self::Auto => vec![ArenaBacking::MemfdThp, ArenaBacking::Memfd],
            Self::Only(backing) => vec![backing],
        }
    }
}

/// Reads the arguments that follow the program's name.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut out = Args {
        json: false,
        map: None,
        hypervisor: Model::default(),
        guest: VmKind::Protected,
        backing: Backing::Auto,
        file: None,
    };
    let mut args = args.into_iter();
    let mut only_files = false;
    while let Some(arg) = args.next() {
        let (name, mut value) = split_value(&arg);
        let is_option = !only_files && arg.as_encoded_bytes().starts_with(b"-") && arg != "-";
        let has_value = value.is_some();
        let mut value_of = |option: &str| {
            let value = value.take().or_else(|| args.next());
            value.ok_or_else(|| format!("{option} needs a value"))
        };
        match name.to_str() {
            Some("--") if is_option => only_files = true,
            Some("--help" | "-h") if is_option => return Ok(Command::Help),
            Some("--json") if is_option && !has_value => out.json = true,
            Some("--map") if is_option => out.map = Some(value_of("--map")?.into()),
            Some("--hypervisor") if is_option => {
                out.hypervisor = hypervisor(&value_of("--hypervisor")?)?;
            }
            Some("--guest") if is_option => out.guest = guest(&value_of("--guest")?)?,
            Some("--backing") if is_option => out.backing = backing(&value_of("--backing")?)?,
            _ if is_option => return Err(format!("unknown option {}", Path::new(&arg).display())),
            _ if out.file.is_some() => {
                return Err(format!(
                    "one FILE only, but there is also {}",
                    Path::new(&arg).display()
                ));
            }
            _ => out.file = Some(arg.into()),
        }
    }
    Ok(Command::Run(out))
}

/// `--option=value` in its two parts; anything else stays whole.
fn split_value(arg: &OsStr) -> (OsString, Option<OsString>) {
    let split = arg.to_str().filter(|arg| arg.starts_with("--")).and_then(|a| a.split_once('='));
    match split {
        Some((name, value)) => (name.into(), Some(value.into())),
        None => (arg.into(), None),
    }
}

fn hypervisor(value: &OsStr) -> Result<Model, String> {
    let name = value.to_string_lossy();
    name.parse().map_err(|_| {
        let names = Model::ALL.map(Model::name).join(", ");
        format!("--hypervisor is one of {names}, not {name}")
    })
}

fn guest(value: &OsStr) -> Result<VmKind, String> {
    let kinds = [VmKind::Protected, VmKind::NonProtected];
    kinds.into_iter().find(|&kind| value == name_of(kind)).ok_or_else(|| {
        format!("--guest is protected or non-protected, not {}", Path::new(value).display())
    })
}

/// What a kind of guest is called.
pub(crate) const fn name_of(kind: VmKind) -> &'static str {
    match kind {
        VmKind::Protected => "protected",
        VmKind::NonProtected => "non-protected",
    }
}

fn backing(value: &OsStr) -> Result<Backing, String> {
    match value.to_str() {
        Some("auto") => Ok(Backing::Auto),
        Some("hugetlb") => Ok(Backing::Only(ArenaBacking::MemfdHugetlb2M)),
        Some("thp") => Ok(Backing::Only(ArenaBacking::MemfdThp)),
        Some("memfd") => Ok(Backing::Only(ArenaBacking::Memfd)),
        _ => Err(format!(
            "--backing is auto, hugetlb, thp or memfd, not {}",
            Path::new(value).display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Command, String> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn options_come_in_any_order_and_both_spellings() {
        let expected = Command::Run(Args {
            json: true,
            map: Some("m.svg".into()),
            hypervisor: Model::ALL[3],
            guest: VmKind::NonProtected,
            backing: Backing::Only(ArenaBacking::Memfd),
            file: Some("f".into()),
        });
        let (guest, backing) = (["--guest", "non-protected"], ["--backing", "memfd"]);
        let hypervisor = ["--hypervisor", Model::ALL[3].name()];
        let spaced = parsed(
            &[&["--map", "m.svg", "f", "--json"], &guest[..], &backing[..], &hypervisor[..]]
                .concat(),
        );
        assert_eq!(spaced.as_ref(), Ok(&expected));
        let hypervisor = format!("--hypervisor={}", Model::ALL[3]);
        let joined =
            ["--backing=memfd", "--json", "--guest=non-protected", &hypervisor, "--map=m.svg", "f"];
        assert_eq!(parsed(&joined), spaced);
        assert_eq!(parsed(&["--json", "--help", "--nonsense"]), Ok(Command::Help));
    }

    #[test]
    fn a_file_may_be_called_like_an_option() {
        let Ok(Command::Run(args)) = parsed(&["--", "--json"]) else { panic!("should parse") };
        assert_eq!((args.json, args.file), (false, Some("--json".into())));
        assert_eq!(args.guest, VmKind::Protected, "unless something else is said");
        assert_eq!(args.hypervisor, Model::default());
        assert_eq!(parsed(&["a=b"]).map(|c| matches!(c, Command::Run(_))), Ok(true));
    }

    #[test]
    fn every_hypervisor_has_its_name() {
        for model in Model::ALL {
            let Ok(Command::Run(args)) = parsed(&["--hypervisor", model.name()]) else {
                panic!("{model} should parse")
            };
            assert_eq!(args.hypervisor, model);
            assert!(usage().contains(model.name()));
        }
        let complaint = parsed(&["--hypervisor=none"]).unwrap_err();
        assert!(complaint.starts_with("--hypervisor is one of "), "{complaint}");
        assert!(complaint.ends_with(", not none"), "{complaint}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (args, complaint) in [
            (vec!["--map"], "--map needs a value"),
            (vec!["--frob"], "unknown option --frob"),
            (vec!["--json=yes"], "unknown option --json=yes"),
            (vec!["a", "b"], "one FILE only, but there is also b"),
            (vec!["--guest=open"], "--guest is protected or non-protected, not open"),
            (vec!["--backing", "floppy"], "--backing is auto, hugetlb, thp or memfd, not floppy"),
        ] {
            assert_eq!(parsed(&args), Err(complaint.to_owned()));
        }
    }
}
