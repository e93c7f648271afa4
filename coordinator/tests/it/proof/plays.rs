//! The ways through the sagas, each with its end.

use proto::{internal::PaymentState, v1::OrderState};

use super::{
    faults::Faults,
    stage::{End, Reported, Stage},
};
use crate::{
    fakes::{Hold, HoldState},
    world::{Publish, SALE},
};

/// One way through a saga.
#[derive(Clone, Copy, Debug)]
pub enum Play {
    /// Paid at once.
    Paid,
    /// Paid, says the provider later.
    PaidLater,
    /// The provider says no, and the buyer gives up.
    Declined,
    /// Not paid in time.
    Expired,
    /// The permit lapsed before it was locked.
    Lapsed,
    /// Paid, but the hold was gone; there is another unit.
    HoldLost,
    /// Paid after its end; there is another unit.
    Late,
    /// Paid after its end, and there is no unit.
    TooLate,
}

impl Play {
    pub const ALL: &'static [Play] = &[
        Play::Paid,
        Play::PaidLater,
        Play::Declined,
        Play::Expired,
        Play::Lapsed,
        Play::HoldLost,
        Play::Late,
        Play::TooLate,
    ];

    /// Plays it to its end. Panics when that is not this play's, or not clean.
    pub async fn run(self, faults: &Faults) -> Reported {
        let mut stage = Stage::open(faults).await;
        self.act(&mut stage).await;
        stage.close(&self.end()).await
    }

    async fn act(self, stage: &mut Stage) {
        match self {
            Play::Paid => {
                stage.hold().await;
                let paid = stage.pay("approve").await.unwrap();
                assert!(matches!(paid.state(), OrderState::Paying | OrderState::Paid), "{paid:?}");
            }
            Play::PaidLater => {
                stage.hold().await;
                stage.leave_open().await;
                stage.provider_says(PaymentState::Captured).await;
            }
            Play::Declined => {
                stage.hold().await;
                // The answer may be lost with who had it.
                let _ = stage.pay("decline").await;
                stage.until("declined", |row| row.state == "AWAITING_PAYMENT" && !row.decline_code.is_empty()).await;
                stage.until("at rest", |row| row.next_attempt_at.is_none()).await;
                assert_eq!(stage.cancel().await.unwrap().state(), OrderState::Cancelled);
            }
            Play::Expired => stage.hold().await,
            Play::Lapsed => {
                stage.world.bus.publishing(Publish::Fails);
                stage.accept_once().await.unwrap_err();
                stage.world.bus.publishing(Publish::Works);
                stage.lapse();
                stage.accept_late().await;
            }
            Play::HoldLost => {
                stage.hold().await;
                stage.leave_open().await;
                stage.lapse();
                stage.provider_says(PaymentState::Captured).await;
            }
            Play::Late | Play::TooLate => {
                stage.hold().await;
                stage.world.fakes.state().void_answer = Some(PaymentState::Cancelled);
                stage.leave_open().await;
                stage.until("expired", |row| row.state == "EXPIRED").await;
                if matches!(self, Play::TooLate) {
                    rival(stage);
                }
                stage.provider_says(PaymentState::Captured).await;
            }
        }
    }

    fn end(self) -> End {
        let (state, record, units, money) = match self {
            Play::Paid | Play::PaidLater | Play::HoldLost | Play::Late => {
                ("PAID", OrderState::Paid, (0, 0, 0, 1), (1, 0))
            }
            Play::Declined => ("CANCELLED", OrderState::Cancelled, (1, 0, 0, 0), (0, 0)),
            Play::Expired => ("EXPIRED", OrderState::Expired, (1, 0, 0, 0), (0, 0)),
            Play::Lapsed => ("REJECTED", OrderState::Rejected, (1, 0, 0, 0), (0, 0)),
            Play::TooLate => ("REFUNDED", OrderState::Refunded, (0, 0, 0, 1), (1, 1)),
        };
        End { state, record, units, money }
    }
}

/// Somebody else buys the only unit.
fn rival(stage: &Stage) {
    let mut state = stage.world.fakes.state();
    state.sales.get_mut(SALE).unwrap().free -= 1;
    let hold = Hold {
        sale: SALE.to_owned(),
        buyer: "rival".to_owned(),
        quantity: 1,
        state: HoldState::Sold,
        epoch: 1,
        granted_at: 0,
    };
    state.holds.insert("rival".to_owned(), hold);
}
