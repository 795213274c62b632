//! The start of a bridge: the hub joins, and reads what its log would have if it had been there all along, before its
//! port accepts anybody.

use std::sync::{Arc, mpsc as blocking};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::driver::Driver;
use super::machine::{Action, Machine, Settings};
use super::redis::RedisBus;
use super::{Bridge, BridgeConfig, Bus, BusConfig, Link};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::fresh_epoch;
use crate::hub::log::{Log, LogLimits, Noting};
use crate::hub::ops::Keeper;
use crate::hub::shared::Shared;

/// Joins the bus, has the hub made with its log, and runs the bridge from then on.
///
/// # Errors
/// [`ErrorKind::Config`], or [`ErrorKind::BusDown`] if the bus cannot be reached in time.
pub(in crate::hub) fn start(
    config: &BridgeConfig,
    log: (LogLimits, Noting),
    handle: &Handle,
    make: impl FnOnce(Keeper, Log) -> Arc<Shared>,
) -> Result<Arc<Shared>> {
    match &config.bus {
        BusConfig::Memory(bus) => launch(bus.clone(), config, log, handle, make),
        BusConfig::Redis(redis) => launch(RedisBus::new(redis)?, config, log, handle, make),
    }
}

fn launch<B: Bus>(
    bus: B,
    config: &BridgeConfig,
    (limits, noting): (LogLimits, Noting),
    handle: &Handle,
    make: impl FnOnce(Keeper, Log) -> Arc<Shared>,
) -> Result<Arc<Shared>> {
    let hub = fresh_epoch()?; // as good a name as any: no other hub has it
    let settings = Settings {
        probe_interval: config.probe_interval,
        bus_timeout: config.bus_timeout,
        attempts: config.max_recovery_attempts,
        cooldown: config.breaker_cooldown,
        keep: limits.events as u64,
    };
    let log = Log::new(String::new(), limits).noting(noting).shared_with_others();
    let opening = open(bus, config.clone(), hub, Machine::new(settings, fastrand::u64(..)), log);
    let (opened, waiting) = blocking::sync_channel(1);
    // The receiver waits: sending cannot fail.
    drop(handle.spawn(async move { drop(opened.send(opening.await)) }));
    let (driver, log) = waiting.recv().map_err(|_| Error::new(ErrorKind::Closed, "the hub's thread has ended"))??;
    let (sender, ops) = mpsc::unbounded_channel();
    let shared = make(Keeper::Bus(Bridge { ops: sender, status: driver.status() }), log);
    // Not among the hub's tasks: it ends after them, when it is closed.
    drop(handle.spawn(driver.run(shared.clone(), ops)));
    Ok(shared)
}

async fn open<B: Bus>(
    bus: B,
    config: BridgeConfig,
    hub: String,
    mut machine: Machine,
    mut log: Log,
) -> Result<(Driver<B>, Log)> {
    let began = Instant::now();
    let within = config.bus_timeout;
    let joining = async {
        machine.tick(began.elapsed());
        let (link, hearing) = bus.connect(&hub).await?;
        let place = link.join(&machine.known(), &fresh_epoch()?).await?;
        machine.connected(began.elapsed(), &place);
        while let Some(action) = machine.next_action() {
            match action {
                Action::Fill { from, most } => machine.filled(link.fill(from, most).await?),
                Action::Join => machine.joined(&link.join(&machine.known(), &fresh_epoch()?).await?),
                Action::Begin { epoch, head } => log.restart(epoch, head),
                Action::Append { count, skip, body } => {
                    for record in body.into_records(count, skip) {
                        log.append(record, Duration::ZERO);
                    }
                }
                // Done, or too early: reading takes time, and is no reason to think that a probe is late.
                Action::Connect | Action::Disconnect | Action::Tell(_) | Action::Probe(_) => {}
            }
        }
        machine.send_probe(began.elapsed());
        Ok((link, hearing))
    };
    let late = || {
        let message = format!("the bus did not answer within {} s", within.as_secs_f64());
        Err(Error::new(ErrorKind::BusDown, message))
    };
    let (link, hearing) = tokio::time::timeout(within, joining).await.unwrap_or_else(|_| late())?;
    let driver = Driver::new(bus, config, hub, machine, began).linked(link, hearing);
    driver.status().write(|stats| stats.up = true);
    Ok((driver, log))
}
