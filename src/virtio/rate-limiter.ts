/**
 * Token buckets, as `bw_size=,bw_one_time_burst=,bw_refill_time=` and `ops_...=` describe them: a bucket of that many
 * tokens (bytes or operations) that fills evenly in the refill time, and a burst that is there once.
 */

/** Refill time in milliseconds. */
export interface BucketOptions {
  readonly size: number;
  readonly oneTimeBurst?: number;
  readonly refillTime: number;
}

export interface LimiterOptions {
  readonly bandwidth?: BucketOptions;
  readonly operations?: BucketOptions;
}

class TokenBucket {
  #tokens: number;
  #burst: number;
  #last: number;
  /** Tokens a millisecond. */
  readonly #rate: number;

  constructor(
    private readonly options: BucketOptions,
    private readonly now: () => number,
  ) {
    this.#tokens = options.size;
    this.#burst = options.oneTimeBurst ?? 0;
    this.#rate = options.size / options.refillTime;
    this.#last = now();
  }

  refill(): void {
    const now = this.now();
    this.#tokens = Math.min(this.#tokens + (now - this.#last) * this.#rate, this.options.size);
    this.#last = now;
  }

  /** A request larger than the bucket waits for a full one, and leaves it in debt: it must go some day. */
  has(count: number): boolean {
    return this.#burst + this.#tokens >= Math.min(count, this.options.size);
  }

  take(count: number): void {
    const fromBurst = Math.min(this.#burst, count);
    this.#burst -= fromBurst;
    this.#tokens -= count - fromBurst;
  }

  /** Milliseconds until `has`. */
  delay(count: number): number {
    const missing = Math.min(count, this.options.size) - this.#burst - this.#tokens;
    return missing <= 0 ? 0 : Math.ceil(missing / this.#rate);
  }
}

export class RateLimiter {
  readonly #bandwidth?: TokenBucket;
  readonly #operations?: TokenBucket;

  /** @param now milliseconds of a clock that never goes back */
  constructor(options: LimiterOptions, now: () => number) {
    if (options.bandwidth !== undefined) this.#bandwidth = new TokenBucket(options.bandwidth, now);
    if (options.operations !== undefined) this.#operations = new TokenBucket(options.operations, now);
  }

  /** Takes one operation of that many bytes, or, when it must wait, nothing. @returns whether it may go now */
  take(bytes: number): boolean {
    this.#refill();
    if (this.#bandwidth?.has(bytes) === false || this.#operations?.has(1) === false) return false;
    this.charge(bytes);
    return true;
  }

  /** Takes an operation of that many bytes which has happened already; what is missing is owed. */
  charge(bytes: number): void {
    this.#bandwidth?.take(bytes);
    this.#operations?.take(1);
  }

  #refill(): void {
    this.#bandwidth?.refill();
    this.#operations?.refill();
  }

  /** Milliseconds until an operation of that many bytes may go. */
  delay(bytes: number): number {
    this.#refill();
    return Math.max(this.#bandwidth?.delay(bytes) ?? 0, this.#operations?.delay(1) ?? 0);
  }
}
