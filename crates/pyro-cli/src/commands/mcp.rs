//! `pyro mcp`: the engine as an MCP server, and the configuration of the hosts that start it.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use etcetera::BaseStrategy;
use pyro_mcp::{HttpOptions, InstallError, Installation, Profile, Server};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::run::network_of;
use super::task::Interrupt;
use crate::cli::{McpInstallArgs, McpServeArgs, McpVerb};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::streams;

/// The environment variable that gives the token of a server over HTTP.
const TOKEN: &str = "PYRO_MCP_TOKEN";
/// A token that is shorter than this is guessed, in characters.
const LEAST_TOKEN: usize = 16;

pub(crate) async fn run(verb: McpVerb, printer: &Printer, interrupt: Interrupt) -> Result<ExitCode, Failure> {
    match verb {
        McpVerb::Serve(args) => serve(args, printer, interrupt).await,
        McpVerb::Install(args) => install(args, printer),
    }
}

async fn serve(args: McpServeArgs, printer: &Printer, mut interrupt: Interrupt) -> Result<ExitCode, Failure> {
    let http = args.http.map(|listen| http_options(&args, listen)).transpose()?;
    let mut config = config::engine(args.backend.clone())?;
    // The next command of an agent is like its last.
    config.spare = true;
    start_log(args.log_file.as_deref())?;
    let (network, secrets) = network_of(args.network, config.policies_dir.as_deref())?;
    let server = Server::new(config, args.profile, network, secrets);
    let owner = args.while_open.map(owner).transpose()?;
    let stop = CancellationToken::new();
    let stopped = tokio::spawn({
        let stop = stop.clone();
        async move {
            let told = tokio::select! {
                told = interrupt.wait_for(Option::is_some) => told.ok().and_then(|code| *code),
                () = gone(owner) => None,
            };
            stop.cancel();
            told
        }
    });
    let served = match http {
        None => {
            let (reader, writer) = streams::protocol().map_err(|error| Failure::host("stdout", &error))?;
            let served = server.serve(reader, writer, stop).await;
            served.map_err(|error| {
                Failure::new("invalid_value", error.to_string())
                    .hint("an MCP host starts this; see: pyro mcp install --help")
            })
        }
        Some((options, made)) => {
            let (listen, token) = (options.listen, options.token.clone());
            let ready = |url: String| tell(printer, &url, made.then_some(&token));
            pyro_mcp::serve_http(&server, options, stop, ready).await.map_err(|error| {
                Failure::host(&format!("listening on {listen}"), &error)
                    .hint("give another address: --http 127.0.0.1:0 takes a free port")
            })
        }
    };
    server.close().await;
    served?;
    // The signal, where there was one, decides the exit code.
    let told = if stopped.is_finished() { stopped.await.ok().flatten() } else { None };
    Ok(told.map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// The pipe whose other end somebody holds as long as the server is wanted.
fn owner(descriptor: u32) -> Result<pipe::Receiver, Failure> {
    let opened = pipe::OpenOptions::new().open_receiver(format!("/proc/self/fd/{descriptor}"));
    opened.map_err(|error| Failure::host(&format!("--while-open {descriptor}"), &error))
}

/// Waits until nobody holds the other end; for ever where there is none.
async fn gone(owner: Option<pipe::Receiver>) {
    let Some(mut owner) = owner else { return std::future::pending().await };
    while matches!(owner.read_u8().await, Ok(_byte)) {}
}

/// Where and how to listen, and whether the token was made here.
fn http_options(args: &McpServeArgs, listen: SocketAddr) -> Result<(HttpOptions, bool), Failure> {
    if !listen.ip().is_loopback() && !args.allow_remote {
        let text = format!("{listen} can be reached from other machines");
        return Err(Failure::new("invalid_value", text).hint(
            "listen on 127.0.0.1, or say --allow-remote: whoever has the token can then run machines here",
        ));
    }
    let given = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
    if given
        .as_ref()
        .is_some_and(|token| token.len() < LEAST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        let text = format!("{TOKEN} must be {LEAST_TOKEN} or more printable characters without white space");
        return Err(Failure::new("invalid_value", text).hint("leave it unset to have one made"));
    }
    let made = given.is_none();
    let token = given.map_or_else(random_token, Ok)?;
    Ok((HttpOptions { listen, token }, made))
}

fn random_token() -> Result<String, Failure> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| Failure::host("random numbers", &error))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Says once where the server is and what its clients must know.
fn tell(printer: &Printer, url: &str, token: Option<&String>) {
    if printer.json() {
        return printer.object(&json!({ "url": url, "token": token }));
    }
    printer.say(&format!("serving MCP at {url}"));
    match token {
        Some(token) => printer.say(&format!("clients send: Authorization: Bearer {token}")),
        None => printer.say(&format!("clients send: Authorization: Bearer, and what {TOKEN} holds")),
    }
}

/// What goes wrong is told on stderr; each call too in a file, where one is wanted. Not on stderr: a host that has a pipe
/// there and does not read it would stop the server once it is full.
fn start_log(file: Option<&std::path::Path>) -> Result<(), Failure> {
    // Lines that are no JSON-RPC are told here and nowhere else.
    let troubles = || {
        Targets::new()
            .with_default(LevelFilter::WARN)
            .with_target("rmcp::transport::async_rw", LevelFilter::DEBUG)
    };
    let on_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let in_file = match file {
        None => None,
        Some(path) => {
            let open = std::fs::File::options().append(true).create(true).open(path);
            let file = open.map_err(|error| {
                Failure::host(&format!("the log file '{}'", path.display()), &error)
                    .hint("name a file that can be written: --log-file FILE")
            })?;
            let layer = tracing_subscriber::fmt::layer().with_writer(Arc::new(file)).with_ansi(false);
            Some(layer.with_filter(troubles().with_target("pyro_mcp", LevelFilter::INFO)))
        }
    };
    let log = tracing_subscriber::registry().with(on_stderr.with_filter(troubles())).with(in_file);
    drop(log.try_init());
    Ok(())
}

fn install(args: McpInstallArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::host("the path of pyro", &error))?;
    let mut arguments = vec!["mcp".to_owned(), "serve".to_owned()];
    if args.profile != Profile::default() {
        arguments.extend(["--profile".to_owned(), args.profile.as_str().to_owned()]);
    }
    let installation = Installation { host: args.host, program, arguments };
    let base = etcetera::base_strategy::Xdg::new();
    let file = match args.file {
        Some(file) => Some(file),
        None => {
            let base =
                base.map_err(|error| Failure::host("no home directory", &error).hint("give --file FILE"))?;
            args.host.file(base.home_dir(), &base.config_dir())
        }
    };
    let Some(file) = file.filter(|_| !args.print) else {
        printer.data(installation.snippet().trim_end());
        return Ok(ExitCode::SUCCESS);
    };
    let installed = installation.write(&file).map_err(|error| {
        let failure = match &error {
            InstallError::NotUnderstood { .. } | InstallError::NoFile => {
                Failure::new("invalid_value", error.to_string())
            }
            InstallError::Io(cause) => Failure::host("the host's configuration", cause),
        };
        failure.hint(&format!("add it by hand; `pyro mcp install {} --print` shows what", args.host.as_str()))
    })?;
    if printer.json() {
        printer.object(
            &json!({ "host": args.host.as_str(), "file": installed.file, "changed": installed.changed }),
        );
    } else if installed.changed {
        printer.data(&format!(
            "Installed in {}. Restart {} to use it.",
            installed.file.display(),
            args.host.as_str()
        ));
    } else {
        printer.data(&format!("Installed in {} already.", installed.file.display()));
    }
    Ok(ExitCode::SUCCESS)
}
