(function () {
  "use strict";
  var cases = [...document.querySelectorAll(".case")];
  var keys = document.getElementById("keys"), button = document.getElementById("keys-button");

  function current() { return cases.indexOf(document.activeElement.closest(".case")); }
  function go(to) {
    var found = cases[Math.max(0, Math.min(cases.length - 1, to))];
    if (found) { found.focus({ preventScroll: true }); found.scrollIntoView({ block: "start" }); }
  }
  function press(verdict) {
    var at = cases[current()], found = at && at.querySelector('button[value="' + verdict + '"]');
    if (found) found.click();
  }
  function help() {
    keys.hidden = !keys.hidden;
    button.setAttribute("aria-expanded", String(!keys.hidden));
  }

  button.hidden = false;
  button.addEventListener("click", help);
  document.addEventListener("keydown", function (event) {
    var typing = event.target.matches("input");
    if (typing && event.key === "Escape") { event.target.closest(".case").focus(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    var does = {
      j: function () { go(current() + 1); }, k: function () { go(current() - 1); },
      K: function () { press("keep"); }, R: function () { press("remove"); }, U: function () { press("undo"); },
      "/": function () { var at = cases[current()]; if (at) at.querySelector('input[name="reason"]').focus(); }, "?": help,
    }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  var named = document.getElementById(location.hash.slice(1));
  if (named && cases.includes(named)) go(cases.indexOf(named));
})();
