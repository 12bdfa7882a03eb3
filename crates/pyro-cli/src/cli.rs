//! The command line. The doc comments are the help.

use clap::{Args, Parser, Subcommand, ValueEnum};
use pyro_engine::Isolation;

/// Give a command, or an agent, a computer of its own
#[derive(Debug, Parser)]
#[command(
    name = "pyro",
    version,
    after_help = "Exit codes: the command's own for run (128+n for signal n, 124 when its time was up); \
                  125 when pyro failed in run; 1 when another command failed; 2 for wrong usage."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run one command in a fresh microVM and remove every trace of it
    Run(RunArgs),
    /// List, build, inspect and remove environments
    #[command(subcommand)]
    Env(EnvVerb),
    /// Report what this machine can do, and what to mend
    Doctor(Output),
    /// Run a short tour in a microVM
    Demo(Output),
    /// Remove what dead owners have left
    Reap(Output),
    /// Print the completion script of a shell
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EnvVerb {
    /// List all environments
    List(Output),
    /// Build an environment, or do nothing where it is installed and sound
    Pull(EnvArgs),
    /// Show one environment and verify every byte of it
    Inspect(EnvArgs),
    /// Remove all installed environments that are not in use
    Prune(Output),
}

#[derive(Debug, Args)]
pub(crate) struct Output {
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EnvArgs {
    /// Name of the environment, such as debian:12
    pub(crate) environment: String,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name of the environment, such as debian:12
    pub(crate) environment: String,
    /// Virtual processors, 1 to 8
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpu_count: u8,
    /// Memory in MiB, 256 to 32768
    #[arg(long, default_value_t = 1024)]
    pub(crate) mem_mib: u32,
    /// Life of the machine in seconds, 60 to 3600
    #[arg(long, default_value_t = 600)]
    pub(crate) ttl_seconds: u32,
    /// Time of the command in seconds
    #[arg(long, default_value_t = 30.0)]
    pub(crate) timeout_seconds: f64,
    /// Give the guest a network
    #[arg(long)]
    pub(crate) network: bool,
    /// Where no guest can be had, run the command on this host, without isolation
    #[arg(long)]
    pub(crate) allow_host_compat: bool,
    /// Refuse anything that isolates less
    #[arg(long, value_name = "TIER")]
    pub(crate) require_isolation: Option<Tier>,
    /// Use this VMM instead of the best that works
    #[arg(long, value_name = "NAME", env = "PYRO_BACKEND")]
    pub(crate) backend: Option<String>,
    #[command(flatten)]
    pub(crate) output: Output,
    /// The command; one word with white space is run by /bin/sh -lc
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Tier {
    FirecrackerKvm,
    QemuKvm,
    QemuTcg,
}

impl From<Tier> for Isolation {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::FirecrackerKvm => Self::FirecrackerKvm,
            Tier::QemuKvm => Self::QemuKvm,
            Tier::QemuTcg => Self::QemuTcg,
        }
    }
}

impl Verb {
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Run(args) => args.output.json,
            Self::Env(EnvVerb::List(output) | EnvVerb::Prune(output))
            | Self::Doctor(output)
            | Self::Demo(output)
            | Self::Reap(output) => output.json,
            Self::Env(EnvVerb::Pull(args) | EnvVerb::Inspect(args)) => args.output.json,
            Self::Completion { .. } | Self::Man => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_on_either_side_and_later_dashes_belong_to_the_command() {
        for line in
            ["pyro run --mem-mib 512 debian:12 -- a -- b", "pyro run debian:12 --mem-mib 512 -- a -- b"]
        {
            let Verb::Run(args) = Cli::try_parse_from(line.split(' ')).expect("parsed").verb else {
                panic!("not run")
            };
            assert_eq!((args.mem_mib, args.command.len()), (512, 3));
        }
    }
}
