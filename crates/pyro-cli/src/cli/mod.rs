//! The command line. The doc comments are the help.

mod mcp;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pyro_engine::Isolation;

pub(crate) use self::mcp::{McpInstallArgs, McpServeArgs, McpVerb};

/// Give a command, or an agent, a computer of its own
#[derive(Debug, Parser)]
#[command(
    name = "pyro",
    version,
    after_help = "Exit codes: the command's own for run, task exec and task attach (128+n for signal n, 124 when its \
                  time was up); 125 when pyro failed in one of these; 1 when another command failed; 2 for wrong \
                  usage; 129, 130 and 143 at SIGHUP, Ctrl-C and SIGTERM; 141 when nobody reads the output any more."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run one command in a fresh microVM and remove every trace of it
    Run(RunArgs),
    /// Keep a microVM, run commands in it, read its journal
    #[command(subcommand)]
    Task(TaskVerb),
    /// List, build, inspect and remove environments
    #[command(subcommand)]
    Env(EnvVerb),
    /// Serve agents over the Model Context Protocol
    #[command(subcommand)]
    Mcp(McpVerb),
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
    /// Print a manual page: of pyro, or of one of its commands
    #[command(hide = true)]
    Man {
        /// Which command, such as `task exec`
        command: Vec<String>,
    },
    /// Serve one task; started by pyro itself
    #[command(hide = true)]
    Supervise {
        /// Which task
        task_id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TaskVerb {
    /// Make a task: a microVM that lives on after this command
    Create(CreateArgs),
    /// Run one command in a task
    Exec(ExecArgs),
    /// Wait for a command of a task, with its output from the beginning
    Attach(AttachArgs),
    /// End a command of a task
    Cancel(CommandArgs),
    /// Show a task
    Status(TaskArgs),
    /// Show the commands of a task with their output
    Logs(LogsArgs),
    /// Show or change what the guest of a task may reach
    Network(TaskNetworkArgs),
    /// Have ports of this host lead to a task's guest
    #[command(subcommand)]
    Port(PortVerb),
    /// List all tasks, newest activity first
    List(Output),
    /// Boot the guest of a stopped task from its disk
    Start(TaskArgs),
    /// Power the guest of a task off; its disk and its journal are kept
    Stop(TaskArgs),
    /// End a task and remove every trace of it
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TaskArgs {
    /// The task's id
    pub(crate) task_id: String,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The task's id
    pub(crate) task_id: String,
    /// Kill the task's supervisor if it does not obey within 3 seconds
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    /// The task's id
    pub(crate) task_id: String,
    /// The command's sequence number
    pub(crate) sequence: u64,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) command: CommandArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Print the id and nothing else
    #[arg(long, conflicts_with = "json")]
    pub(crate) id_only: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The task's id
    pub(crate) task_id: String,
    /// Start the command and do not wait for it; it gets our stdin whole
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) exec: ExecFlags,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// A command, for `run` and `task exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecFlags {
    /// Time of the command in seconds
    #[arg(long, default_value_t = 30.0, allow_negative_numbers = true)]
    pub(crate) timeout_seconds: f64,
    /// A variable of the command; may be given more than once
    #[arg(short = 'e', long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Who runs it in the guest, by name or number: root unless told
    #[arg(long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Where it starts in the guest, absolute: /workspace unless told
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// Leave our stdin alone; the command has none
    #[arg(short = 'n', long)]
    pub(crate) no_stdin: bool,
    /// The command; one word with white space is run by /bin/sh -lc
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The task's id
    pub(crate) task_id: String,
    /// Only the command with this number
    #[arg(long, value_name = "N", conflicts_with_all = ["since", "limit"])]
    pub(crate) sequence: Option<u64>,
    /// Only commands with this number or a greater one
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) since: u64,
    /// Only the newest so many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Output of all together at the most, in bytes
    #[arg(long, value_name = "BYTES")]
    pub(crate) max_bytes: Option<u64>,
    /// Show what the guest did on its network instead
    #[arg(long, conflicts_with_all = ["sequence", "since", "limit", "max_bytes"])]
    pub(crate) network: bool,
    /// Follow new output
    #[arg(long, conflicts_with = "json")]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EnvVerb {
    /// List all environments
    List(Output),
    /// Build an environment, or do nothing where it is installed and sound
    Pull(PullArgs),
    /// Show one environment and verify every byte of it
    Inspect(EnvArgs),
    /// Remove all installed environments that are not in use
    Prune(Output),
    /// Have all guests boot with a kernel of one's own, or tell which they boot with
    Kernel(KernelArgs),
    /// Install Firecracker, which runs the guests where KVM works
    Firecracker(FirecrackerArgs),
}

#[derive(Debug, Args)]
pub(crate) struct KernelArgs {
    /// An uncompressed kernel (vmlinux) that has built in what a guest needs
    #[arg(long, value_name = "VMLINUX", conflicts_with = "remove")]
    pub(crate) from: Option<std::path::PathBuf>,
    /// Let guests boot with the kernels of their environments again
    #[arg(long)]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct FirecrackerArgs {
    /// The archive to take it from, instead of $PYRO_FIRECRACKER: a release's .tgz or a wheel, as a file or an https address
    #[arg(long, value_name = "ARCHIVE")]
    pub(crate) from: Option<std::path::PathBuf>,
    #[command(flatten)]
    pub(crate) output: Output,
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
pub(crate) struct PullArgs {
    #[command(flatten)]
    pub(crate) environment: EnvArgs,
    /// Also make the template that machines are restored from, which otherwise the first one does
    #[arg(long)]
    pub(crate) prepare: bool,
    /// Virtual processors of the template's machines, 1 to 8
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, requires = "prepare")]
    pub(crate) vcpu_count: i64,
    /// Memory of the template's machines in MiB, 256 to 32768
    #[arg(long, default_value_t = 1024, allow_negative_numbers = true, requires = "prepare")]
    pub(crate) mem_mib: i64,
    /// Size of their writable disk in MiB, 256 to 1048576
    #[arg(long, default_value_t = 8192, allow_negative_numbers = true, requires = "prepare")]
    pub(crate) disk_mib: i64,
}

#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Name of the environment, such as debian:12
    pub(crate) environment: String,
    /// Virtual processors, 1 to 8
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    pub(crate) vcpu_count: i64,
    /// Memory in MiB, 256 to 32768
    #[arg(long, default_value_t = 1024, allow_negative_numbers = true)]
    pub(crate) mem_mib: i64,
    /// Size of the writable disk in MiB, 256 to 1048576; only what is written takes room
    #[arg(long, default_value_t = 8192, allow_negative_numbers = true)]
    pub(crate) disk_mib: i64,
    /// Life of the machine in seconds, 60 to 3600
    #[arg(long, default_value_t = 600, allow_negative_numbers = true)]
    pub(crate) ttl_seconds: i64,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    #[arg(short, long, value_name = "PORT", help = format!("Publish a port of the guest: {PORT}"))]
    pub(crate) publish: Vec<String>,
    /// Where no guest can be had, run the command on this host, without isolation
    #[arg(long)]
    pub(crate) allow_host_compat: bool,
    /// Refuse anything that isolates less
    #[arg(long, value_name = "TIER")]
    pub(crate) require_isolation: Option<Tier>,
    /// Boot the machine, also where a saved one could be restored
    #[arg(long)]
    pub(crate) cold: bool,
    /// Run the VMM with nothing that keeps it apart from this host, where the host refuses what a jail needs
    #[arg(long)]
    pub(crate) unconfined_vmm: bool,
    /// Use this VMM instead of the best that works, or instead of $PYRO_BACKEND
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: Option<String>,
}

const ALLOW: &str =
    "Allow a host: NAME[:PORTS], *.NAME[:PORTS], ADDRESS[/LENGTH][:PORTS] or host.pyro.internal:PORT";

/// What a guest may reach. With none of these it has no network device.
#[derive(Debug, Args)]
pub(crate) struct NetworkArgs {
    /// Allow the public internet; never this host, its networks, or cloud metadata
    #[arg(long)]
    pub(crate) network: bool,
    #[arg(long, value_name = "HOST", help = ALLOW)]
    pub(crate) allow: Vec<String>,
    /// Deny a host, also where another rule allows it
    #[arg(long, value_name = "HOST")]
    pub(crate) deny: Vec<String>,
    /// Take rules from a file, or from a policy of this name in ~/.config/pyro/policies
    #[arg(long, value_name = "FILE")]
    pub(crate) network_policy: Option<String>,
    /// Let the guest use a secret that it never sees: NAME=env:VARIABLE@HOST or NAME=file:PATH@HOST, more hosts after commas
    #[arg(long, value_name = "SECRET")]
    pub(crate) secret: Vec<String>,
}

const PORT: &str = "[IP:]HOSTPORT:GUESTPORT; 127.0.0.1 unless told, host port 0 takes a free one";

#[derive(Debug, Subcommand)]
pub(crate) enum PortVerb {
    /// Have a port of this host lead to one of the guest's loopback
    Add(PortArgs),
    /// Show the published ports of a task
    List(TaskArgs),
    /// Publish a port no more; its connections are reset
    Remove(PortArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    /// The task's id
    pub(crate) task_id: String,
    #[arg(value_name = "PORT", help = PORT, required = true)]
    pub(crate) ports: Vec<String>,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct TaskNetworkArgs {
    /// The task's id
    pub(crate) task_id: String,
    #[arg(long, value_name = "HOST", help = ALLOW)]
    pub(crate) allow: Vec<String>,
    /// Deny a host, also where another rule allows it
    #[arg(long, value_name = "HOST")]
    pub(crate) deny: Vec<String>,
    /// Remove a rule; open connections that no other rule allows are reset
    #[arg(long, value_name = "HOST")]
    pub(crate) revoke: Vec<String>,
    /// Allow the public internet
    #[arg(long, conflicts_with = "closed")]
    pub(crate) open: bool,
    /// Allow the public internet no more
    #[arg(long)]
    pub(crate) closed: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Keep a machine of this kind running for the next such command, for so many seconds; 0: none. Instead of
    /// $PYRO_KEEP_READY
    #[arg(long, value_name = "SECONDS")]
    pub(crate) keep_ready: Option<u32>,
    #[command(flatten)]
    pub(crate) exec: ExecFlags,
    #[command(flatten)]
    pub(crate) output: Output,
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
            Self::Task(verb) => match verb {
                TaskVerb::Create(args) => args.output.json,
                TaskVerb::Exec(args) => args.output.json,
                TaskVerb::Logs(args) => args.output.json,
                TaskVerb::List(output) => output.json,
                TaskVerb::Cancel(args) | TaskVerb::Attach(AttachArgs { command: args }) => args.output.json,
                TaskVerb::Status(args) | TaskVerb::Start(args) | TaskVerb::Stop(args) => args.output.json,
                TaskVerb::Delete(args) => args.output.json,
                TaskVerb::Network(args) => args.output.json,
                TaskVerb::Port(PortVerb::Add(args) | PortVerb::Remove(args)) => args.output.json,
                TaskVerb::Port(PortVerb::List(args)) => args.output.json,
            },
            Self::Mcp(verb) => verb.json(),
            Self::Env(EnvVerb::List(output) | EnvVerb::Prune(output))
            | Self::Doctor(output)
            | Self::Demo(output)
            | Self::Reap(output) => output.json,
            Self::Env(EnvVerb::Pull(PullArgs { environment: args, .. }) | EnvVerb::Inspect(args)) => {
                args.output.json
            }
            Self::Env(EnvVerb::Firecracker(args)) => args.output.json,
            Self::Env(EnvVerb::Kernel(args)) => args.output.json,
            Self::Completion { .. } | Self::Man { .. } | Self::Supervise { .. } => false,
        }
    }

    /// Whether the exit code is that of a command in a guest, so that pyro's own failures need another.
    pub(crate) fn runs_a_command(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Task(TaskVerb::Exec(_) | TaskVerb::Attach(_)))
    }

    /// Whether it has to be told of a signal, because what it has begun does not end with it.
    pub(crate) fn ends_by_itself(&self) -> bool {
        matches!(self, Self::Task(TaskVerb::Exec(_)) | Self::Mcp(McpVerb::Serve(_)))
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
            assert_eq!((args.machine.mem_mib, args.exec.command.len()), (512, 3));
        }
    }
}
