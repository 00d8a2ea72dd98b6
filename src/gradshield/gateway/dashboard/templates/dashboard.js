(function () {
  "use strict";
  // Everything here works without scripts by loading the page again. The HTML that is put in is the server's own, escaped there.
  function piece(url) {
    return fetch(url, { credentials: "same-origin", redirect: "error" }).then(function (answer) {
      if (!answer.ok) throw new Error(String(answer.status));
      return answer.text();
    }).then(function (text) { return new DOMParser().parseFromString(text, "text/html"); });
  }

  function poll() {
    var here = document.getElementById("live");
    if (!here || !("active" in here.dataset)) return;
    if (document.hidden) { window.setTimeout(poll, 2000); return; }
    piece(here.dataset.live).then(function (found) {
      var fresh = found.getElementById("live");
      if (fresh.dataset.status !== here.dataset.status) { window.location.reload(); return; }
      var old = here.querySelector("details"), now = fresh.querySelector("details"), stops = "a, summary";
      if (old && now) now.open = old.open;
      var at = Array.prototype.indexOf.call(here.querySelectorAll(stops), document.activeElement);
      here.replaceWith(fresh);
      if (at >= 0 && fresh.querySelectorAll(stops)[at]) fresh.querySelectorAll(stops)[at].focus();
    }).catch(function () { here.dataset.stale = ""; }).then(function () { window.setTimeout(poll, 2000); });
  }
  window.setTimeout(poll, 2000);

  var value = document.getElementById("value"), slide = document.getElementById("slide");
  if (!value) return;
  slide.hidden = false;
  var last = 0, waiting;
  function ask() {
    var turn = ++last;
    piece(value.dataset.from + "?value=" + encodeURIComponent(value.value)).then(function (found) {
      if (turn !== last) return; // a later answer is under way
      var fresh = found.getElementById("cut-answer");
      document.getElementById("cut-answer").replaceWith(fresh);
      var specs = JSON.parse(fresh.querySelector("[data-specs]").textContent);
      document.dispatchEvent(new CustomEvent("specs", { detail: specs }));
    }).catch(function () { /* the button says what is wrong */ });
  }
  function soon() { window.clearTimeout(waiting); waiting = window.setTimeout(ask, 150); }
  slide.addEventListener("input", function () { value.value = Number(slide.value).toPrecision(4); soon(); });
  value.addEventListener("input", function () {
    if (value.value.trim() && isFinite(value.value)) { slide.value = value.value; soon(); }
  });
})();
