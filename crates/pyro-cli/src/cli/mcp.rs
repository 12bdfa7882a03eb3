//! The command line of `pyro mcp`. The doc comments are the help.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use pyro_mcp::{Host, Profile};

use super::{NetworkArgs, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum McpVerb {
    /// Serve agents over stdio, or over HTTP on this machine
    Serve(McpServeArgs),
    /// Have an MCP host start the server, or print what it needs for that
    Install(McpInstallArgs),
}

#[derive(Debug, Args)]
pub(crate) struct McpServeArgs {
    /// Which tools: all, vm_run and those of tasks, or vm_run alone
    #[arg(long, default_value = "full", value_parser = profiles())]
    pub(crate) profile: Profile,
    /// Serve streamable HTTP at this address instead of stdio
    #[arg(long, value_name = "ADDRESS:PORT", num_args = 0..=1, default_missing_value = "127.0.0.1:8931")]
    pub(crate) http: Option<SocketAddr>,
    /// With --http: also listen where other machines can connect
    #[arg(long, requires = "http")]
    pub(crate) allow_remote: bool,
    /// What machines may reach whose agent asks for a network
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    /// Write the log to this file too, not only to stderr
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Use this VMM instead of the best that works, or instead of $PYRO_BACKEND
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// With --http: print the address and the token as one JSON object on stdout
    #[arg(long, requires = "http")]
    pub(crate) json: bool,
    /// Serve only while the other end of this pipe is open: whoever started the server may be killed
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) while_open: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct McpInstallArgs {
    /// Which host
    #[arg(value_parser = hosts())]
    pub(crate) host: Host,
    /// Which tools the host gets: all, vm_run and those of tasks, or vm_run alone
    #[arg(long, default_value = "full", value_parser = profiles())]
    pub(crate) profile: Profile,
    /// Write into this file instead of the host's own, such as a project's .mcp.json
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Print the configuration and write nothing
    #[arg(long)]
    pub(crate) print: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl McpVerb {
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Serve(args) => args.json,
            Self::Install(args) => args.output.json,
        }
    }
}

fn profiles() -> impl TypedValueParser<Value = Profile> {
    const ALL: [Profile; 3] = [Profile::Full, Profile::TaskCore, Profile::VmRun];
    PossibleValuesParser::new(ALL.map(Profile::as_str))
        .map(|name| ALL.into_iter().find(|profile| profile.as_str() == name).unwrap_or_default())
}

fn hosts() -> impl TypedValueParser<Value = Host> {
    PossibleValuesParser::new(Host::ALL.map(Host::as_str))
        .map(|name| Host::ALL.into_iter().find(|host| host.as_str() == name).unwrap_or(Host::Generic))
}
