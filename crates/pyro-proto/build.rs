//! Generates the messages and the service from `proto/agent.proto`, without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let files = protox::compile(["agent.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).bytes(".pyro.agent").compile_fds(files)?;
    Ok(())
}
