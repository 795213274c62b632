//! The start of a bridge: the hub joins, and reads what its log would have if it had been there all along, before its
//! port accepts anybody. A bus that is away is tried again for as long as an event would wait for it.

use std::sync::{Arc, mpsc as blocking};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::driver::{Driver, within};
use super::hearing::Hearing;
use super::machine::{Action, Machine, Settings};
use super::redis::RedisBus;
use super::{Bridge, BridgeConfig, Bus, BusConfig, BusDown, Link, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::abort::Abort;
use crate::hub::fresh_epoch;
use crate::hub::log::{Log, LogLimits, Noting};
use crate::hub::ops::Keeper;
use crate::hub::service::Part;
use crate::hub::shared::Shared;

/// Joins the bus, has the hub made with its log, and runs the bridge from then on.
///
/// # Errors
/// [`ErrorKind::Config`]; [`ErrorKind::BusDown`] if the bus cannot be reached in time and the hub is to wait for it;
/// [`ErrorKind::BusRefused`] at once if the bus does not let it in; [`ErrorKind::Closed`] if the start was aborted.
pub(in crate::hub) fn start(
    config: &BridgeConfig,
    log: (LogLimits, Noting),
    (handle, abort): (&Handle, &Abort),
    make: impl FnOnce(Keeper, Log) -> Arc<Shared>,
) -> Result<Arc<Shared>> {
    match &config.bus {
        BusConfig::Memory(bus) => launch(bus.clone(), config, log, (handle, abort), make),
        BusConfig::Redis(redis) => launch(RedisBus::new(redis)?, config, log, (handle, abort), make),
    }
}

fn launch<B: Bus>(
    bus: B,
    config: &BridgeConfig,
    (limits, noting): (LogLimits, Noting),
    (handle, abort): (&Handle, &Abort),
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
    let aborted = abort.clone();
    // The receiver waits: sending cannot fail.
    drop(handle.spawn(async move {
        let result = tokio::select! {
            result = opening => result,
            () = aborted.ordered() => Err(Error::new(ErrorKind::Closed, "the hub was stopped while it started")),
        };
        drop(opened.send(result));
    }));
    let (driver, log) = waiting.recv().map_err(|_| Error::new(ErrorKind::Closed, "the hub's thread has ended"))??;
    let (sender, ops) = mpsc::unbounded_channel();
    let status = driver.status();
    let shared = make(Keeper::Bus(Bridge { ops: sender, status: status.clone() }), log);
    // Not among the hub's tasks: it ends after them, when it is closed.
    let running = handle.spawn(driver.run(shared.clone(), ops));
    drop(handle.spawn(mourn(running, shared.clone(), status)));
    Ok(shared)
}

/// Whoever hears nothing any more must not look healthy, whatever the reason.
async fn mourn(running: JoinHandle<()>, shared: Arc<Shared>, status: Arc<Status>) {
    let Err(error) = running.await else { return };
    let why = format!("the bridge of this hub has ended by a fault of its own, restart the program: {error}");
    status.write(|stats| (stats.up, stats.degraded, stats.error) = (false, true, Some(why)));
    let notice = "The bridge between the hubs has failed; nothing comes until this one is restarted.";
    shared.with(|state, _| state.trouble(Part::Bridge, Some(notice.to_owned())));
}

async fn open<B: Bus>(
    bus: B,
    config: BridgeConfig,
    hub: String,
    mut machine: Machine,
    mut log: Log,
) -> Result<(Driver<B>, Log)> {
    let began = Instant::now();
    let mut failed = Error::new(ErrorKind::BusDown, "there was no time for an attempt");
    loop {
        machine.tick(began.elapsed());
        let mut connects = false;
        while let Some(action) = machine.next_action() {
            connects |= matches!(action, Action::Connect); // the others need a hub, or a link
        }
        if connects {
            match join(&bus, &hub, &config, (&mut machine, &mut log), began).await {
                Ok((link, hearing)) => {
                    let driver = Driver::new(bus, config, hub, machine, began).linked(link, hearing);
                    driver.status().write(|stats| stats.up = true);
                    return Ok((driver, log));
                }
                Err(error) if matches!(error.kind(), ErrorKind::BusRefused | ErrorKind::Config) => return Err(error),
                Err(error) => failed = error,
            }
            machine.lost(began.elapsed(), &failed.report());
        }
        let Some(at) = machine.deadline().filter(|at| *at < config.bus_timeout) else { break };
        tokio::time::sleep_until((began + at).into()).await;
    }
    match config.bus_down {
        BusDown::Wait => {
            let tried = config.bus_timeout.as_secs_f64();
            Err(Error::new(failed.kind(), format!("{} (tried for {tried} s)", failed.report())))
        }
        BusDown::Local => {
            machine.leave();
            log.restart(fresh_epoch()?, 0);
            Ok((Driver::new(bus, config, hub, machine, began).alone(), log))
        }
    }
}

/// Makes a link, and reads over it what the log is to have.
async fn join<B: Bus>(
    bus: &B,
    hub: &str,
    config: &BridgeConfig,
    (machine, log): (&mut Machine, &mut Log),
    began: Instant,
) -> Result<(B::Link, Hearing)> {
    let left = config.bus_timeout.saturating_sub(began.elapsed());
    let connecting = async {
        let (link, hearing) = bus.connect(hub).await?;
        let place = link.join(&machine.known(), &fresh_epoch()?).await?;
        Ok((link, hearing, place))
    };
    let (link, hearing, place) = within(left, connecting).await?;
    machine.connected(began.elapsed(), &place);
    while let Some(action) = machine.next_action() {
        match action {
            Action::Fill { from, most } => {
                machine.filled(from, within(config.bus_timeout, link.fill(from, most)).await?);
            }
            Action::Join => {
                let joining = async { link.join(&machine.known(), &fresh_epoch()?).await };
                let place = within(config.bus_timeout, joining).await?;
                machine.joined(&place);
            }
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
}
